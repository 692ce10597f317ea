"""The client of an object store: it waits for a store that is away by one budget, and its errors name the object."""

import os
from collections.abc import Mapping
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError  # type: ignore[import-untyped]
from s3fs import S3FileSystem  # type: ignore[import-untyped]
from s3fs.errors import translate_boto_error  # type: ignore[import-untyped]
from upath.implementations.cloud import S3Path
from upath.registry import register_implementation

# A store that is away for a minute or two ends no run. (botocore reads both; who sets them is obeyed.)
for _variable, _value in {"AWS_RETRY_MODE": "standard", "AWS_MAX_ATTEMPTS": "20"}.items():
    os.environ.setdefault(_variable, _value)


class Client(S3FileSystem):  # type: ignore[misc]
    """s3fs, which would multiply botocore's attempts by its own; of those only the ones at half an answer are left."""

    async def _call_s3(self, method: str, *defaults: Mapping[str, Any], **options: Any) -> Any:
        where = f"s3://{options.get('Bucket', '')}/{options.get('Key', options.get('Prefix', ''))}"
        try:
            await self.set_session()
            call = getattr(await self.get_s3(options.get("Bucket")), method)
            return await call(**self._get_s3_method_kwargs(call, *defaults, **options))
        except ClientError as error:
            raise translate_boto_error(error, f"{where}: {error.response['Error'].get('Message') or error}") from error
        except BotoCoreError as error:
            # What is no error of the client's is not tried again.
            raise OSError(f"{where}: {error}") from error


class ObjectPath(S3Path):
    """A path in an object store. By pickle, too, it comes with our client."""

    __slots__ = ()

    @classmethod
    def _fs_factory(cls, urlpath: str, protocol: str, storage_options: Mapping[str, Any]) -> Client:
        return Client(**storage_options)


# The library makes paths of registered classes only.
register_implementation("s3", ObjectPath, clobber=True)
