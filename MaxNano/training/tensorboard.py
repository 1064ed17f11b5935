"""TensorBoard event files as bytes, so that they can be written to a bucket and after a kill.

tensorboardX's own writer appends to a local file only, and cannot redraw the events of steps that a
resumed run does not repeat.
"""

import struct
import time
from collections.abc import Mapping

from ml_collections import FrozenConfigDict
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import hparams, scalar

from MaxNano import config_schema

COMPARED = ("validation/bpb", "train/loss")  # curves next to the hyperparameters of each run


def file_start(first_step: int) -> bytes:
    """The start of a file that hides what earlier files of its folder show from first_step on."""
    session = SessionLog(status=SessionLog.SessionStatus.START)
    events = (
        Event(wall_time=time.time(), file_version="brain.Event:2"),
        Event(wall_time=time.time(), step=first_step, session_log=session),
    )
    return b"".join(record(event.SerializeToString()) for event in events)


def scalars(numbers: Mapping[str, float], step: int, seconds: float) -> bytes:
    """Numbers of a step, at a time in seconds since 1970, as an event; b"" if there are none."""
    values = [value for name, number in numbers.items() for value in scalar(name, number).value]
    if not values:
        return b""
    event = Event(wall_time=seconds, step=step, summary=Summary(value=values))
    return record(event.SerializeToString())


def hyperparameters(config: FrozenConfigDict, step: int) -> bytes:
    """The values of train.py's keys as events at `step`, for TensorBoard's tab HPARAMS."""
    values = {}
    for name, key in config_schema.base_keys().items():
        value = config.get(name)
        if "train" in key.programs and key.kind != "path" and key.depth < 2 and value is not None:
            is_list = isinstance(value, tuple)
            values[name] = config_schema.format_value(value) if is_list else value
    experiment, session, _ = hparams(values, dict.fromkeys(COMPARED, 0.0))
    events = (Event(wall_time=time.time(), step=step, summary=s) for s in (experiment, session))
    return b"".join(record(event.SerializeToString()) for event in events)


def record(data: bytes) -> bytes:
    """`data` as a TFRecord: length, its checksum, data, its checksum."""
    length = struct.pack("<Q", len(data))
    checksums = (struct.pack("<I", masked_crc32c(part)) for part in (length, data))
    return length + next(checksums) + data + next(checksums)
