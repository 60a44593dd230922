"""A certificate authority for the tests."""

import subprocess
from pathlib import Path


class Authority:
    """A CA that issues certificates for 127.0.0.1 and for clients, as PEM files."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self.folder = folder
        self.cafile, self.cakey = folder / f"{name}.pem", folder / f"{name}.key"
        self._openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
                      "-nodes", "-days", "2", "-subj", f"/CN=test {name}",
                      "-keyout", self.cakey, "-out", self.cafile)

    def issue(self, name, extension="subjectAltName=IP:127.0.0.1"):
        """Issue a certificate. Return (certificate file, key file)."""
        cert, key, request = (self.folder / f"{name}.{kind}" for kind in ("pem", "key", "csr"))
        extensions = self.folder / f"{name}.ext"
        extensions.write_text(extension + "\n")
        self._openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
                      "-subj", f"/CN={name}", "-keyout", key, "-out", request)
        self._openssl("x509", "-req", "-in", request, "-CA", self.cafile, "-CAkey", self.cakey,
                      "-CAcreateserial", "-days", "2", "-extfile", extensions, "-out", cert)
        return cert, key

    def _openssl(self, *args):
        subprocess.run(["openssl", *map(str, args)], check=True, capture_output=True)
