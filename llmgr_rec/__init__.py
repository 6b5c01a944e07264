"""Session recommendation: sharded item tables, session encoders, kNN blends and language models.

The names in `__all__` are the public API; everything else may change without notice. They are imported when they are
first asked for, so `import llmgr_rec` costs nothing and needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from llmgr_rec.interruption import report_interrupts_of_imports
from llmgr_rec.library_imports import collector_paused, process_unchanged

if TYPE_CHECKING:
    from llmgr_rec.config import Config as Config
    from llmgr_rec.config import EncoderConfig as EncoderConfig
    from llmgr_rec.config import TablesConfig as TablesConfig
    from llmgr_rec.config_file import load_config as load_config
    from llmgr_rec.data.batch import RawSessions as RawSessions
    from llmgr_rec.data.batch import SessionBatch as SessionBatch
    from llmgr_rec.data.catalog import Catalog as Catalog
    from llmgr_rec.data.collate import CandidateItems as CandidateItems
    from llmgr_rec.data.collate import Collator as Collator
    from llmgr_rec.data.dataset import Dataset as Dataset
    from llmgr_rec.data.graph import SessionGraph as SessionGraph
    from llmgr_rec.data.graph import build_graphs as build_graphs
    from llmgr_rec.data.jagged import Jagged as Jagged
    from llmgr_rec.data.preparation.pipeline import prepare_dataset as prepare_dataset
    from llmgr_rec.data.preparation.settings import PrepareSettings as PrepareSettings
    from llmgr_rec.data.reader import DataShard as DataShard
    from llmgr_rec.data.reader import SamplingOrder as SamplingOrder
    from llmgr_rec.data.reader import SessionReader as SessionReader
    from llmgr_rec.distributed.process_group import World as World
    from llmgr_rec.distributed.process_group import init_distributed as init_distributed
    from llmgr_rec.distributed.process_group import shutdown as shutdown
    from llmgr_rec.distributed.ranking import CatalogRanker as CatalogRanker
    from llmgr_rec.distributed.ranking import RankingModel as RankingModel
    from llmgr_rec.distributed.sharding import shard as shard
    from llmgr_rec.errors import UserError as UserError
    from llmgr_rec.explanation.records import Explanation as Explanation
    from llmgr_rec.kernels.softmax_loss import ranking_loss as ranking_loss
    from llmgr_rec.modules.encoders import build_encoder as build_encoder
    from llmgr_rec.modules.item_tables import ItemTables as ItemTables
    from llmgr_rec.modules.llmgr import LLMGR as LLMGR
    from llmgr_rec.modules.model_spec import ModelSpec as ModelSpec
    from llmgr_rec.modules.model_spec import build_recommender as build_recommender
    from llmgr_rec.modules.recommender import RecommenderOutput as RecommenderOutput
    from llmgr_rec.modules.recommender import SessionRecommender as SessionRecommender
    from llmgr_rec.modules.session_encoder import EncodedSessions as EncodedSessions
    from llmgr_rec.modules.session_encoder import SessionEncoder as SessionEncoder
    from llmgr_rec.python_api import Recommender as Recommender
    from llmgr_rec.storage.bundle import Bundle as Bundle
    from llmgr_rec.storage.bundle import load_bundle as load_bundle
    from llmgr_rec.storage.bundle_export import export_bundle as export_bundle
    from llmgr_rec.storage.model_factory import ModelFactory as ModelFactory
    from llmgr_rec.storage.table_io import init_tables as init_tables
    from llmgr_rec.towers.llmgr_tower import LLMGRTower as LLMGRTower
    from llmgr_rec.towers.session_tower import SessionTower as SessionTower

__version__ = "0.2.0"

report_interrupts_of_imports()

# Where each public name lives; the imports above tell type checkers the same.
_MODULES = {
    "Bundle": "storage.bundle",
    "CandidateItems": "data.collate",
    "Catalog": "data.catalog",
    "CatalogRanker": "distributed.ranking",
    "Collator": "data.collate",
    "Config": "config",
    "DataShard": "data.reader",
    "Dataset": "data.dataset",
    "EncodedSessions": "modules.session_encoder",
    "EncoderConfig": "config",
    "Explanation": "explanation.records",
    "ItemTables": "modules.item_tables",
    "Jagged": "data.jagged",
    "LLMGR": "modules.llmgr",
    "LLMGRTower": "towers.llmgr_tower",
    "ModelFactory": "storage.model_factory",
    "ModelSpec": "modules.model_spec",
    "PrepareSettings": "data.preparation.settings",
    "RankingModel": "distributed.ranking",
    "RawSessions": "data.batch",
    "Recommender": "python_api",
    "RecommenderOutput": "modules.recommender",
    "SamplingOrder": "data.reader",
    "SessionBatch": "data.batch",
    "SessionEncoder": "modules.session_encoder",
    "SessionGraph": "data.graph",
    "SessionReader": "data.reader",
    "SessionRecommender": "modules.recommender",
    "SessionTower": "towers.session_tower",
    "TablesConfig": "config",
    "UserError": "errors",
    "World": "distributed.process_group",
    "build_encoder": "modules.encoders",
    "build_graphs": "data.graph",
    "build_recommender": "modules.model_spec",
    "export_bundle": "storage.bundle_export",
    "init_distributed": "distributed.process_group",
    "init_tables": "storage.table_io",
    "load_bundle": "storage.bundle",
    "load_config": "config_file",
    "prepare_dataset": "data.preparation.pipeline",
    "ranking_loss": "kernels.softmax_loss",
    "shard": "distributed.sharding",
    "shutdown": "distributed.process_group",
}
__all__ = sorted(_MODULES)

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Imports a public name when it is first asked for."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        with process_unchanged(), collector_paused():
            value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
