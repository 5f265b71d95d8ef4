"""Our log records in the logs of a Prefect flow run, and on the console in the format that was asked for.

A process that runs flows or tasks arranges this once, wherever it is: the command line, a Prefect worker's child, a
Dask or Ray worker. The records of our loggers from INFO on then go to the flow run that they belong to, with run,
stage and block in front of the message; nothing has to be set for that. Where `PREFECT_LOGGING_EXTRA_LOGGERS` names
our loggers, Prefect has given them a handler of its own, which shows no fields and warns about every record outside of
a run; ours takes its place.
"""

from __future__ import annotations

import logging
from functools import cache

from prefect.context import FlowRunContext, TaskRunContext
from prefect.logging.handlers import APILogHandler

from rise_ops.logs import PACKAGES, PlainFormatter, formatter, wanted_format


class RunLogHandler(APILogHandler):
    """Sends records of flow and task runs to the Prefect server; others are not its concern."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.setFormatter(PlainFormatter(bare=True))

    def emit(self, record: logging.LogRecord) -> None:
        """Send a record where a flow or task run is at work."""
        if FlowRunContext.get() is not None or TaskRunContext.get() is not None:
            super().emit(record)


@cache
def arrange_logs() -> None:
    """Do so, once a process."""
    handler = RunLogHandler()
    for name in PACKAGES:
        logger = logging.getLogger(name)
        for other in [each for each in logger.handlers if isinstance(each, APILogHandler)]:
            logger.removeHandler(other)
        logger.addHandler(handler)
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.INFO)
    if wanted_format() == "json":
        for console in logging.getLogger().handlers:
            console.setFormatter(formatter("json"))
