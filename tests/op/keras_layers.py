"""What Keras' BatchNormalization does, run in a process of its own: python -m tests.op.keras_layers CASES RESULTS.

CASES: name -> {momentum (Keras'), epsilon, weights (gamma, beta, moving_mean, moving_variance), batches [T, N, C, *S]};
RESULTS: name -> {trained [T, N, C, *S], evaluated (the first batch), weights}. Keras
computes in float32, whatever it is given.
"""

import os
import sys

os.environ["KERAS_BACKEND"] = "torch"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Keras would move to a GPU


def main() -> None:
    import keras
    import numpy
    import torch

    cases, results = sys.argv[1:]
    outputs = {}
    for name, case in torch.load(cases, weights_only=True).items():
        layer = keras.layers.BatchNormalization(axis=1, momentum=case["momentum"], epsilon=case["epsilon"])
        layer.build((None, *case["batches"].shape[2:]))
        layer.set_weights([w.numpy() for w in case["weights"]])
        batches = case["batches"].numpy()
        trained = [keras.ops.convert_to_numpy(layer(x, training=True)) for x in batches]
        evaluated = keras.ops.convert_to_numpy(layer(batches[0], training=False))
        outputs[name] = {
            "trained": torch.from_numpy(numpy.stack(trained)),
            "evaluated": torch.from_numpy(evaluated),
            "weights": [torch.from_numpy(numpy.array(w)) for w in layer.get_weights()],
        }
    torch.save(outputs, results)


if __name__ == "__main__":
    main()
