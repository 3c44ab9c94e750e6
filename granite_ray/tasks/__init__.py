"""Task programs: what the model is asked of one document, as coroutines on records.

They see no Ray, no storage and no torch.
"""

from granite_ray.config import (
    ClassifyConfig,
    ExtractConfig,
    GenerateConfig,
    SummarizeConfig,
    TaskConfig,
)
from granite_ray.tasks.base import Task, TaskLimits
from granite_ray.tasks.classify import Classify, ClassifyMulti
from granite_ray.tasks.extract import Extract
from granite_ray.tasks.generate import Generate
from granite_ray.tasks.summarize import Summarize
from granite_ray.tokenizer import Tokenizer

__all__ = ["Task", "TaskLimits", "make_task"]


def make_task(config: TaskConfig, tokenizer: Tokenizer, limits: TaskLimits) -> Task:
    """Return the task that a config describes: the one place that maps a kind to a class.

    Raises:
        ConfigError: A template, schema, label or limit of the task section cannot work.
    """
    match config:
        case SummarizeConfig():
            return Summarize(config, tokenizer, limits)
        case ClassifyConfig(multi_label=True):
            return ClassifyMulti(config, tokenizer, limits)
        case ClassifyConfig():
            return Classify(config, tokenizer, limits)
        case ExtractConfig():
            return Extract(config, tokenizer, limits)
        case GenerateConfig():
            return Generate(config, tokenizer, limits)
