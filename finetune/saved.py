"""SavedState: the state of a fine-tuning on the disk, and whether it is of the same training."""

from collections.abc import Mapping
from pathlib import Path

from mlc.configs import load
from mlc.configs.errors import MlcError
from mlc.finetune.config import FinetuneConfig
from mlc.finetune.processes import Processes
from mlc.finetune.training import FineTuning
from mlc.heads.checkpoint import Checkpoint, checkpoint_path
from mlc.heads.config import NOT_SETTINGS
from mlc.heads.run_folder import RESULTS

# Places and switches with which a training can go on as it was.
MAY_CHANGE = NOT_SETTINGS | {"workers", "on_error", "tensorboard", "weights", "compile"}
OF = "finetune"  # what is saved, by the checkpoint's own word


class SavedState:
    """The file beside a run folder that is not written yet.

    Args:
        config: resolved.
        source: hash of the label table as read.
    """

    def __init__(self, config: FinetuneConfig, source: str) -> None:
        assert config.out is not None
        self._config, self._source, self._out = config, source, config.out
        self._file = Checkpoint(checkpoint_path(config.out), OF, config.checkpoint_minutes)

    @property
    def how_to_go_on(self) -> str:
        """Return a sentence: what is kept, and the command that goes on."""
        return f"the state is saved; mlc finetune --resume {self._out} goes on from it"

    def due(self, *, epoch_ended: bool) -> bool:
        """Return whether it is time to save."""
        return self._file.due(epoch_ended=epoch_ended)

    def save(
        self,
        tuning: FineTuning,
        bad: Mapping[str, Mapping[int, str]],
        done: int,
        processes: Processes,
    ) -> None:
        """Write the state aside and rename it, in the first process, while others wait.

        Raises:
            MlcError: it cannot be written.
        """
        if processes.first:
            self._file.save(
                {
                    "config": self._config.model_dump(mode="json"),
                    "source": self._source,
                    "done": done,
                    "bad": {split: dict(found) for split, found in bad.items()},
                    "tuning": tuning.state(),
                }
            )
        processes.wait()

    def restore(self, tuning: FineTuning, bad: dict[str, dict[int, str]]) -> int:
        """Bring a training to where it was; return how many steps are done.

        Raises:
            MlcError: what is saved there is of other settings or labels, which are named.
        """
        saved = self._file.restore()
        if saved is None:
            return 0
        now = self._config.model_dump(mode="json")
        changed = [
            f"{name} ({saved['config'].get(name)!r} then, {value!r} now)"
            for name, value in now.items()
            if name not in MAY_CHANGE and saved["config"].get(name) != value
        ]
        if saved["source"] != self._source:
            changed.append("the labels of the data set")
        if changed:
            raise MlcError(
                f"{checkpoint_path(self._out)}: is the state of a training with other settings: "
                f"{', '.join(changed)}; name another --out, or remove it to begin anew"
            )
        tuning.restore(saved["tuning"])
        bad.update(saved["bad"])
        return int(saved["done"])


def saved_config(run: Path) -> FinetuneConfig:
    """Return the config of a training that can be gone on with.

    Args:
        run: the run folder that it will write.

    Raises:
        MlcError: there is no such training, or it is finished.
    """
    path = checkpoint_path(run)
    assert path is not None
    state = Checkpoint(path, OF, 1).restore()
    if state is None:
        if (run / RESULTS).is_file():
            raise MlcError(f"{run}: is finished, there is nothing to resume")
        raise MlcError(
            f"{run}: no training to resume, looked for {path}; the command that began it goes on "
            "from its last state too, if any was saved"
        )
    return load(FinetuneConfig, "finetune", flags=state["config"])
