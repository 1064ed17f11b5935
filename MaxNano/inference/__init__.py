"""The model at inference: KV cache, decoding, shared-prefix scoring, sampling and the continuous-batching engine."""
