"""What the calibration text says about the merged model: one pass, kept in a folder, shared by all backends."""

from lora2edge.calibration.replay import Inputs, Replay
from lora2edge.calibration.statistics import calibrate
from lora2edge.calibration.stored import StoredCalibration, open_calibration

__all__ = ["Inputs", "Replay", "StoredCalibration", "calibrate", "open_calibration"]
