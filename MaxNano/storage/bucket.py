"""Google Cloud Storage: gcsfs with time limits, without cached listings, with errors on one line."""

import logging
import os
import re
import urllib.parse
from typing import Any

from MaxNano import console

try:
    import aiohttp
    from gcsfs import core
except ImportError:
    raise ValueError(
        "gs:// needs gcsfs: pip install -c constraints.txt 'etils[epath-gcs]'"
    ) from None

# gcsfs itself has no limits. It retries transient errors six times in about half a minute.
CONNECT_SECONDS = 20
SILENCE_SECONDS = 30  # without a byte of the response
REQUEST_SECONDS = 300  # per request; an upload is split into requests of at most 5 MiB


class BucketError(OSError, ValueError):
    """A bucket that cannot be reached, read or written; the message is one line for the user."""


class Bucket(core.GCSFileSystem):
    """gcsfs for buckets without a hierarchical namespace.

    Listings are not cached, because other machines write to the same bucket. Every error is an
    OSError: FileNotFoundError, or BucketError with one line. gcsfs's default class asks by gRPC for
    the type of the bucket, which needs another permission.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        limits = aiohttp.ClientTimeout(
            total=REQUEST_SECONDS, sock_connect=CONNECT_SECONDS, sock_read=SILENCE_SECONDS
        )
        defaults = {"use_listings_cache": False, "requests_timeout": limits}
        if os.environ.get("STORAGE_EMULATOR_HOST"):  # an emulator needs no credentials
            defaults["token"] = "anon"
        for library in ("gcsfs", "fsspec"):  # they log each failure with a traceback, then raise it
            logging.getLogger(library).setLevel(logging.CRITICAL)
        super().__init__(*args, **{**defaults, **options})

    async def _call(self, method: str, path: str, *args: Any, **options: Any) -> Any:
        try:
            return await super()._call(method, path, *args, **options)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{_object(path, args)} is missing") from error
        except FileExistsError as error:
            raise BucketError(f"{_object(path, args)}: precondition failed (412)") from error
        except Exception as error:  # of gcsfs, requests, aiohttp, google.auth or a time limit
            reason = re.sub(r"https?://\S+|\bb/\S+/o\S*", "", str(error))  # the request's URL
            reason = console.one_line(reason).strip(" :") or type(error).__name__
            raise BucketError(f"{_object(path, args)}: {reason}") from error


def _object(path: str, args: tuple[str, ...]) -> str:
    """The gs:// path that a request refers to."""
    if args:
        return "gs://" + "/".join(args[:2])
    url = urllib.parse.urlsplit(path)
    bucket, _, name = url.path.partition("/b/")[2].partition("/o")
    name = name.strip("/") or urllib.parse.parse_qs(url.query).get("name", [""])[0]
    return f"gs://{bucket}/{urllib.parse.unquote(name)}"
