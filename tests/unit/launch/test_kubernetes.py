"""The manifest against the schemas that the cluster would check it by, and what its rules make of each end of a pod."""

import os
import pathlib
import re

import pytest
import yaml
from pydantic import ValidationError

from mlt.config.load import load_config
from mlt.config.run import RunConfig

from .kubernetes_schema import ConfigMap, JobSet
