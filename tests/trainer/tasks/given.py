"""Data, as far as a step of the optimiser asks for it."""


class Given:
    def __init__(self, global_batch, skips=False):
        self.global_batch, self.skips = global_batch, skips
