"""``python -m mlc`` is the ``mlc`` command."""

from mlc.cli import main

main()
