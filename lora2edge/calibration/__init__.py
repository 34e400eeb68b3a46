"""What the calibration text says about the merged model: one pass, kept in a folder, shared by all backends."""

from lora2edge.calibration.replay import Inputs, Replay
from lora2edge.calibration.statistics import calibrate
from lora2edge.calibration.stored import LabelledCalibration, StoredCalibration, open_calibration, store_labelled

__all__ = [
    "Inputs",
    "LabelledCalibration",
    "Replay",
    "StoredCalibration",
    "calibrate",
    "open_calibration",
    "store_labelled",
]
