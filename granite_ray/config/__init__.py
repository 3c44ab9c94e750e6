"""All that a user can set, in one place: one YAML file is one frozen `JobConfig`.

Everything that can be wrong with a config is found here, before the first process starts.
"""

from granite_ray.config.load import (
    config_schema,
    describe_errors,
    load_config,
    load_server_config,
    parse_config,
    parse_section,
    read_values,
    write_config,
)
from granite_ray.config.sections import (
    ChunkingConfig,
    EngineConfig,
    FilterCondition,
    JobConfig,
    JobSection,
    ModelConfig,
    ServerConfig,
    SinkConfig,
    SourceConfig,
)
from granite_ray.config.serve import ServeConfig
from granite_ray.config.task import (
    ClassifyConfig,
    Example,
    ExtractConfig,
    GenerateConfig,
    SummarizeConfig,
    TaskConfig,
    TaskSection,
)

__all__ = [
    "ChunkingConfig",
    "ClassifyConfig",
    "EngineConfig",
    "Example",
    "ExtractConfig",
    "FilterCondition",
    "GenerateConfig",
    "JobConfig",
    "JobSection",
    "ModelConfig",
    "ServeConfig",
    "ServerConfig",
    "SinkConfig",
    "SourceConfig",
    "SummarizeConfig",
    "TaskConfig",
    "TaskSection",
    "config_schema",
    "describe_errors",
    "load_config",
    "load_server_config",
    "parse_config",
    "parse_section",
    "read_values",
    "write_config",
]
