"""Makes the worker of a site lie: with this folder on PYTHONPATH it does, in training, what the file LIE names.

A real process of a real site: only what it answers is another thing. Python runs this file before anything else.
"""

import os
import sys
import time
from pathlib import Path
from unittest import mock

if "fedseg.launch.sites.site_worker" in sys.orig_argv:
    sys.path.insert(0, str(Path.cwd()))
    import torch

    from fedseg.federation.flower import client
    from fedseg.federation.flower.envelope import Envelope
    from fedseg.federation.flower.records import Answer, Question
    from fedseg.federation.state import State

    honest, signed = client.SiteClient.answer, client.SiteClient.signed

    def lie_in(text: str) -> str:
        file = Path(os.environ["LIE"])
        return file.read_text() if file.exists() and '"kind":"train"' in text else ""

    def answer(self: client.SiteClient, envelope: Envelope) -> Envelope:
        lie = lie_in(envelope.text)
        if lie == "silence":
            time.sleep(3600)
        return Envelope("\x00 garbage", b"\x93NUMPY garbage") if lie == "garbage" else honest(self, envelope)

    def sign(
        self: client.SiteClient, text: str, question: Question, message: State, told: Answer, state: State
    ) -> Envelope:
        """It signs what it lies."""
        if lie_in(text) == "not finite":
            lies = {g: {n: t * torch.nan for n, t in ts.items()} for g, ts in state.tensors.items()}
            state = State(lies, state.scalars)
        return signed(self, text, question, message, told, state)

    mock.patch.object(client.SiteClient, "answer", answer).start()
    mock.patch.object(client.SiteClient, "signed", sign).start()
