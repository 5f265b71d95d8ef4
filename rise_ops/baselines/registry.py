"""From a method's configuration to the method."""

from __future__ import annotations

from typing import Any

from rise_ops.baselines.base import Method, Setting
from rise_ops.baselines.bm25 import Bm25
from rise_ops.baselines.hidden_state import HiddenState
from rise_ops.baselines.last_layer import LastLayer
from rise_ops.baselines.plain import Length, Loss, Random
from rise_ops.baselines.rapidin import RapidIn
from rise_ops.baselines.rise import Rise
from rise_ops.baselines.trackstar import TrackStar
from rise_ops.baselines.zeroth_order import ZerothOrder
from rise_ops.compare_config import MethodConfig

METHODS: dict[str, Any] = {
    "rise": Rise,
    "rapidin": RapidIn,
    "trackstar": TrackStar,
    "z0_inf": ZerothOrder,
    "last_layer": LastLayer,
    "bm25": Bm25,
    "hidden_state": HiddenState,
    "loss": Loss,
    "length": Length,
    "random": Random,
}
"""Classes of methods by the name that configurations use."""


def open_method(config: MethodConfig, setting: Setting) -> Method:
    """The method, with nothing loaded yet.

    Raises
    ------
    ConfigError
        Its parameters do not go together with the setting.
    """
    method: Method = METHODS[config.method](setting, config)
    return method
