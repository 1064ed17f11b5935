"""Google Cloud Storage: gcsfs with time limits, without a cache of listings, with errors of one line."""

import logging
import os
import re
import urllib.parse
from typing import Any

try:
    import aiohttp
    from gcsfs import core
except ImportError:
    raise ValueError(
        "gs:// needs gcsfs: pip install -c constraints.txt 'etils[epath-gcs]'"
    ) from None

# Seconds. gcsfs itself would wait for ever. Where an error may pass, it tries six times in about half a minute.
CONNECT_SECONDS = 20
SILENCE_SECONDS = 30  # without a byte of the answer
REQUEST_SECONDS = 300  # for one request, of which an upload has 5 MiB at most


class BucketError(OSError, ValueError):
    """A bucket that cannot be reached, read or written; the message is one line for the user."""


class Bucket(core.GCSFileSystem):
    """gcsfs for flat buckets.

    Every listing is asked for anew: other machines write to the same bucket, and gcsfs would keep what it once saw.
    What goes wrong is an OSError: FileNotFoundError, or BucketError with one line.
    gcsfs's own default class looks up by gRPC what kind of bucket it has, which needs another permission.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        limits = aiohttp.ClientTimeout(
            total=REQUEST_SECONDS, sock_connect=CONNECT_SECONDS, sock_read=SILENCE_SECONDS
        )
        defaults = {"use_listings_cache": False, "requests_timeout": limits}
        if os.environ.get("STORAGE_EMULATOR_HOST"):  # a stand-in asks for no credentials
            defaults["token"] = "anon"
        for library in (
            "gcsfs",
            "fsspec",
        ):  # they log each failure with its traceback, and then raise it
            logging.getLogger(library).setLevel(logging.CRITICAL)
        super().__init__(*args, **{**defaults, **options})

    async def _call(self, method: str, path: str, *args: Any, **options: Any) -> Any:
        try:
            return await super()._call(method, path, *args, **options)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{_place(path, args)} is missing") from error
        except FileExistsError as error:
            raise BucketError(f"{_place(path, args)}: precondition failed (412)") from error
        except Exception as error:  # of gcsfs, requests, aiohttp, google.auth or a limit on time
            reason = re.sub(r"https?://\S+|\bb/\S+/o\S*", "", str(error))  # the request's address
            reason = " ".join(reason.split()).strip(" :") or type(error).__name__
            raise BucketError(f"{_place(path, args)}: {reason}") from error


def _place(path: str, args: tuple[str, ...]) -> str:
    """What a request is about, as the user would write it."""
    if args:
        return "gs://" + "/".join(args[:2])
    url = urllib.parse.urlsplit(path)
    bucket, _, name = url.path.partition("/b/")[2].partition("/o")
    name = name.strip("/") or urllib.parse.parse_qs(url.query).get("name", [""])[0]
    return f"gs://{bucket}/{urllib.parse.unquote(name)}"
