"""The client of an object store: each request outlasts a store that is away for a while, and errors name the object."""

import asyncio
import os
import random
from collections.abc import Mapping
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError  # type: ignore[import-untyped]
from s3fs import S3FileSystem  # type: ignore[import-untyped]
from s3fs.errors import translate_boto_error  # type: ignore[import-untyped]
from upath.implementations.cloud import S3Path
from upath.registry import register_implementation

from selfalign.core import preemption
from selfalign.core.locations import will_pass

ATTEMPTS = 20
"""How often a request is made where AWS_MAX_ATTEMPTS says nothing: for three minutes, so that a store that is away for
one or two ends no run."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 20.0
LAST_ATTEMPTS = 2
"""How often a request is made by a process that was asked to end."""


class Client(S3FileSystem):  # type: ignore[misc]
    """s3fs, with attempts that are each request's own.

    botocore lets all requests of a client share a hundred or so for its lifetime, which two outages use up, and s3fs
    multiplies them by its own; of those only the ones at half an answer are left.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(config_kwargs={"retries": {"total_max_attempts": 1}}, **options)
        self._attempts = int(os.environ.get("AWS_MAX_ATTEMPTS") or ATTEMPTS)

    async def _call_s3(self, method: str, *defaults: Mapping[str, Any], **options: Any) -> Any:
        where = f"s3://{options.get('Bucket', '')}/{options.get('Key', options.get('Prefix', ''))}"
        attempt = 0
        while True:
            attempt += 1
            try:
                await self.set_session()
                call = getattr(await self.get_s3(options.get("Bucket")), method)
                return await call(**self._get_s3_method_kwargs(call, *defaults, **options))
            except (ClientError, BotoCoreError) as error:
                most = LAST_ATTEMPTS if preemption.is_ending() else self._attempts
                if attempt >= most or not will_pass(error):
                    if isinstance(error, ClientError):
                        told = error.response["Error"].get("Message") or error
                        raise translate_boto_error(error, f"{where}: {told}") from error
                    # What is no error of the client's s3fs does not try again.
                    raise OSError(f"{where}: {error}") from error
            await _pause(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**attempt) * random.uniform(0.5, 1))


async def _pause(seconds: float) -> None:
    while seconds > 0 and not preemption.is_ending():
        await asyncio.sleep(min(seconds, 1))
        seconds -= 1


class ObjectPath(S3Path):
    """A path in an object store. By pickle, too, it comes with our client."""

    __slots__ = ()

    @classmethod
    def _fs_factory(cls, urlpath: str, protocol: str, storage_options: Mapping[str, Any]) -> Client:
        return Client(**storage_options)


# The library makes paths of registered classes only.
register_implementation("s3", ObjectPath, clobber=True)
