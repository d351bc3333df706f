"""Makes the worker of a site lie: with this folder on PYTHONPATH it does, in training, what the file LIE names.

A real process of a real site: only what it answers is another thing. Python runs this file before anything else.
"""

import os
import sys
import time
from pathlib import Path
from unittest import mock

if "fedseg.launch.site_worker" in sys.orig_argv:
    sys.path.insert(0, str(Path.cwd()))
    from fedseg.federation.flower import client
    from fedseg.federation.flower.envelope import Envelope

    honest = client.SiteClient.answer

    def answer(self: client.SiteClient, envelope: Envelope) -> Envelope:
        file = Path(os.environ["LIE"])
        lie = file.read_text() if file.exists() and '"kind":"train"' in envelope.text else ""
        if lie == "silence":
            time.sleep(3600)
        if lie == "garbage":
            return Envelope("\x00 garbage", b"\x93NUMPY garbage")
        found = honest(self, envelope)
        if lie == "not finite":
            start = 8 + int.from_bytes(found.data[:8], "little")
            return Envelope(found.text, found.data[:start] + b"\xff" * (len(found.data) - start))
        return found

    mock.patch.object(client.SiteClient, "answer", answer).start()
