"""Registry of the session encoders."""

from llmgr_rec.config import EncoderConfig
from llmgr_rec.modules.esasrec import ESASRec
from llmgr_rec.modules.gcsan import GCSAN
from llmgr_rec.modules.gru4rec import GRU4Rec
from llmgr_rec.modules.hstu import HSTU
from llmgr_rec.modules.sasrec import SASRec
from llmgr_rec.modules.session_encoder import SessionEncoder
from llmgr_rec.modules.srgnn import SRGNN
from llmgr_rec.modules.stamp import STAMP
from llmgr_rec.registry import construct, resolve_class

_SETTING = "setting encoder.name"

ENCODERS: dict[str, type[SessionEncoder]] = {
    "gcsan": GCSAN,
    "srgnn": SRGNN,
    "sasrec": SASRec,
    "esasrec": ESASRec,
    "hstu": HSTU,
    "gru4rec": GRU4Rec,
    "stamp": STAMP,
}


def encoder_class(name: str) -> type[SessionEncoder]:
    """The encoder class that `encoder.name` selects.

    Args:
        name: Key of `ENCODERS`, or the import path of a subclass of `SessionEncoder`, whose module is imported.

    Raises:
        UserError: The name is unknown, its import fails, or it is not a session encoder with the arguments of one.
    """
    return resolve_class(name, ENCODERS, _SETTING, SessionEncoder, ("config", "dim"))  # type: ignore[type-abstract]


def build_encoder(config: EncoderConfig, dim: int) -> SessionEncoder:
    """Builds the encoder that the settings select.

    Args:
        config: Encoder settings.
        dim: Width of item, node and session vectors, in columns.

    Returns:
        A newly initialized encoder.

    Raises:
        UserError: The encoder is unknown, or a setting is out of its range.
    """
    return construct(encoder_class(config.name), config.name, _SETTING, config, dim)
