from ttt_e2e.config.parse import override as override
from ttt_e2e.config.presets import preset as preset
from ttt_e2e.config.schema import ModelConfig as ModelConfig
from ttt_e2e.config.schema import RunConfig as RunConfig
from ttt_e2e.config.schema import TrainConfig as TrainConfig
from ttt_e2e.errors import UserError as UserError
from ttt_e2e.evaluation.documents import evaluate_documents as evaluate_documents
from ttt_e2e.inference.load import load_model as load_model
from ttt_e2e.inference.session import Session as Session
from ttt_e2e.inference.session_pool import SessionPool as SessionPool
from ttt_e2e.inference.streaming import read_mini_batch as read_mini_batch
from ttt_e2e.inner_loop.meta_loss import sequence_loss as sequence_loss
from ttt_e2e.model.transformer import Transformer as Transformer
from ttt_e2e.retrieval.notebook import Notebook as Notebook
from ttt_e2e.training.trainer import train as train

__version__: str
__all__: list[str]
