"""Settings that move while a run goes on: schedules of the step, and controllers that read a metric."""

from entroray.control.controllers import Control, Controller, build_controllers

__all__ = ["Control", "Controller", "build_controllers"]
