"""SGLang imports torchaudio for any sound, and needs it for other rates than 16 kHz alone."""
