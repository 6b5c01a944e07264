"""The session encoders by name."""

from llmgr_rec.config import EncoderConfig
from llmgr_rec.modules.gcsan import GCSAN
from llmgr_rec.modules.gru4rec import GRU4Rec
from llmgr_rec.modules.sasrec import SASRec
from llmgr_rec.modules.session_encoder import SessionEncoder
from llmgr_rec.modules.srgnn import SRGNN
from llmgr_rec.modules.stamp import STAMP
from llmgr_rec.registry import resolve_class

ENCODERS: dict[str, type[SessionEncoder]] = {
    "gcsan": GCSAN,
    "srgnn": SRGNN,
    "sasrec": SASRec,
    "gru4rec": GRU4Rec,
    "stamp": STAMP,
}


def encoder_class(name: str) -> type[SessionEncoder]:
    """The class that `encoder.name` stands for.

    Args:
        name: Key of `ENCODERS`, or the import path of a subclass of `SessionEncoder`, whose module is imported.

    Raises:
        UserError: There is no such class.
    """
    return resolve_class(name, ENCODERS, "setting encoder.name", SessionEncoder)  # type: ignore[type-abstract]


def build_encoder(config: EncoderConfig, dim: int) -> SessionEncoder:
    """Builds the encoder that the settings name.

    Args:
        config: Encoder settings.
        dim: Width of item, node and session vectors, in columns.

    Returns:
        A freshly initialized encoder.

    Raises:
        UserError: There is no such encoder, or it cannot be built with these settings.
    """
    return encoder_class(config.name)(config, dim)
