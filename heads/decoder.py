"""DecoderConfig: the sizes of heads that attend, and what they are by default."""

from typing import Literal

from mlc.configs import Config
from mlc.configs.errors import MlcError

SelfAttention = Literal["none", "first", "others", "all"]


class DecoderConfig(Config):
    """Sizes of a Query2Label or ML-Decoder head; None is what its paper has.

    Attributes:
        hidden_dim: width of queries and tokens within the head; tokens of another width are
            projected to it. By default of Query2Label the tokens' own, of ML-Decoder 768.
        ffn_dim: inner width of the feed-forward networks; by default of Query2Label four times
            ``hidden_dim``, of ML-Decoder 2,048.
        attention_heads: of each attention; by default 4 and 8.
        encoder_layers: of Query2Label, over the tokens.
        decoder_layers: of Query2Label, from labels to tokens.
        self_attention: of Query2Label, decoder layers in which labels attend to labels: "none",
            the "first", all "others", or "all".
        input_projection: of Query2Label, project tokens even if they have the width already.
        query_groups: of ML-Decoder, how many queries there are, at most one for a label; by
            default 100.
        dropout: of attentions and feed-forward networks, in training.
    """

    hidden_dim: int | None = None
    ffn_dim: int | None = None
    attention_heads: int | None = None
    encoder_layers: int = 1
    decoder_layers: int = 2
    self_attention: SelfAttention = "none"
    input_projection: bool = False
    query_groups: int | None = None
    dropout: float = 0.1

    def attends_itself(self, layer: int) -> bool:
        """Return whether labels attend to labels in a decoder layer, counted from 0."""
        return self.self_attention in ("all", "first" if layer == 0 else "others")


MOST_LAYERS = 100


def check_decoder(config: DecoderConfig) -> None:
    """Raise an MlcError for sizes that no head can have."""
    for name in ("hidden_dim", "ffn_dim", "attention_heads", "decoder_layers", "query_groups"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise MlcError(f"{name}: should be at least 1, got {value}")
    if config.encoder_layers < 0:
        raise MlcError(f"encoder_layers: should be at least 0, got {config.encoder_layers}")
    for name in ("encoder_layers", "decoder_layers"):
        if getattr(config, name) > MOST_LAYERS:
            raise MlcError(f"{name}: should be at most {MOST_LAYERS}, got {getattr(config, name)}")
    if not 0 <= config.dropout < 1:
        raise MlcError(f"dropout: should be at least 0 and below 1, got {config.dropout}")


def check_width(hidden_dim: int, attention_heads: int, multiple: int = 1) -> None:
    """Raise an MlcError if a width cannot be shared by attention heads, or is no such multiple."""
    for divisor, what in ((attention_heads, "attention_heads"), (multiple, "the position code")):
        if hidden_dim % divisor:
            raise MlcError(
                f"hidden_dim: should be divisible by {divisor}, for {what}, got {hidden_dim}"
            )
