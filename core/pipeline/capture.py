"""`torchspec capture`: the features of every sample into a directory, once, for any number of trainings on them.

One engine makes them in the groups, and so in the shapes, in which the first epoch of a training in one process would.
A record gets its name when it is whole, so a capture that was stopped at any moment goes on with what is there.
"""

from __future__ import annotations

import fcntl
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from torchspec.core import registry
from torchspec.core.config.schema import RunConfig
from torchspec.core.data.dataset import DatasetSettings, TokenDataset, load_dataset
from torchspec.core.errors import (
    ConfigError,
    DamagedRecordError,
    FeatureStoreError,
    MissingRecordError,
    Problem,
    TargetError,
)
from torchspec.core.features.directory import SUFFIX, DirectoryStore
from torchspec.core.features.manifest import CAPTURE, MANIFEST, Lost, Manifest, read_json, record_name, write_json
from torchspec.core.features.memory import MemoryStore, take
from torchspec.core.features.stored_rows import read_rows
from torchspec.core.interfaces.engine import CaptureRequest, TargetEngine
from torchspec.core.interfaces.features import Features, NormState, Quarantined
from torchspec.core.models.target_spec import running_dtype
from torchspec.core.pipeline.assembly import ENGINE, ProgressSink, engine_options
from torchspec.core.pipeline.capture_config import captured_config
from torchspec.core.pipeline.device_fit import Ranks
from torchspec.core.pipeline.offline import features_identity, refuse_other_features
from torchspec.core.pipeline.plan_load import draft_of_shapes
from torchspec.core.pipeline.preflight import Checked, check
from torchspec.core.pipeline.run_dir import versions
from torchspec.core.training.capturing import assigned
from torchspec.core.training.plan import Cut, Plan, Shares
from torchspec.core.training.signals import StopRequest
from torchspec.core.training.trainer import LEAST_QUARANTINED
