"""Block models, and autoregressive ones as blocks of one token: the decode engine, and self-speculation."""
