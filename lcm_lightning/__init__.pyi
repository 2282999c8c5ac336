"""What is imported when it is first asked for; see `lcm_lightning/__init__.py`."""

from .callbacks.export import ExportLora as ExportLora
from .callbacks.export import ExportPipeline as ExportPipeline
from .config.resolvers import package_file as package_file
from .data.datamodule import CaptionedImages as CaptionedImages
from .diffusion.consistency import ConsistencyDistillation as ConsistencyDistillation
from .diffusion.trajectory import TrajectoryDistillation as TrajectoryDistillation
from .errors import UserError as UserError
from .evaluation.contenders import Lineup as Lineup
from .evaluation.evaluation import evaluate_models as evaluate_models
from .evaluation.model_sources import LoadedModel as LoadedModel
from .evaluation.model_sources import ModelSource as ModelSource
from .evaluation.protocol import Protocol as Protocol
from .evaluation.reference import RealImages as RealImages
from .methods.kd_lora import KdLoraDistillation as KdLoraDistillation
from .methods.lcm import LcmDistillation as LcmDistillation
from .methods.lcm_lora import LcmLoraDistillation as LcmLoraDistillation
from .methods.lora import LoraFinetuning as LoraFinetuning
from .methods.pcm_lora import PcmLoraDistillation as PcmLoraDistillation
from .methods.tcd_lora import TcdLoraDistillation as TcdLoraDistillation
from .models.adapters import LoraSettings as LoraSettings
from .models.adapters import active_adapters as active_adapters
from .models.adapters import load_lora as load_lora
from .models.sampling import DDIM as DDIM
from .models.sampling import DPMPP as DPMPP
from .models.sampling import InitialImage as InitialImage
from .models.sampling import sample as sample
from .models.stable_diffusion import load_stable_diffusion as load_stable_diffusion
from .output.pictures import contact_sheet as contact_sheet
from .runs.loading import load_run as load_run

__version__: str
