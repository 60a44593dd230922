"""A certificate authority for the tests."""

import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

_CONFIG = """\
[ca]
default_ca = it
[it]
database = {folder}/index.txt
new_certs_dir = {folder}
default_md = sha256
unique_subject = no
rand_serial = yes
policy = any
[any]
commonName = supplied
organizationName = optional
"""


class Authority:
    """A CA that issues certificates for 127.0.0.1 and for clients, as PEM files.

    Its own certificate has no extension keyUsage, as those of some clusters.
    """

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self.folder = folder
        self.cafile, self.cakey = folder / f"{name}.pem", folder / f"{name}.key"
        self._openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
                      "-nodes", "-days", "2", "-subj", f"/CN=test {name}",
                      "-keyout", self.cakey, "-out", self.cafile)

    def issue(self, name, extension="subjectAltName=IP:127.0.0.1", subject="", seconds=None):
        """Issue a certificate. Return (certificate file, key file).

        seconds  lifetime; None: two days
        """
        cert, key, request = (self.folder / f"{name}.{kind}" for kind in ("pem", "key", "csr"))
        extensions = self.folder / f"{name}.ext"
        extensions.write_text(extension + "\n")
        self._openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
                      "-subj", subject or f"/CN={name}", "-keyout", key, "-out", request)
        if seconds is None:
            self._openssl("x509", "-req", "-in", request, "-CA", self.cafile, "-CAkey", self.cakey,
                          "-CAcreateserial", "-days", "2", "-extfile", extensions, "-out", cert)
            return cert, key
        config = self.folder / "ca.conf"
        config.write_text(_CONFIG.format(folder=self.folder))
        (self.folder / "index.txt").touch()
        now = datetime.now(UTC)
        begin, end = (f"{when:%Y%m%d%H%M%SZ}"
                      for when in (now - timedelta(minutes=1), now + timedelta(seconds=seconds)))
        self._openssl("ca", "-batch", "-notext", "-config", config, "-cert", self.cafile,
                      "-keyfile", self.cakey, "-startdate", begin, "-enddate", end,
                      "-extfile", extensions, "-in", request, "-out", cert)
        return cert, key

    def _openssl(self, *args):
        subprocess.run(["openssl", *map(str, args)], check=True, capture_output=True)
