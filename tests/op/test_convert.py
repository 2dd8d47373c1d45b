"""convert and revert lose nothing."""

import pytest
from torch import nn

from syncbn import SyncBatchNorm, convert, revert


def test_convert_and_revert_change_classes_and_nothing_else():
    shared = nn.BatchNorm2d(4)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), shared, nn.Sequential(shared, nn.BatchNorm1d(5)), nn.GroupNorm(2, 4))
    model[1].note = "kept"
    before = {id(t) for t in model.state_dict(keep_vars=True).values()}

    assert convert(model) is model
    assert [type(m) for m in (model[1], model[2][0], model[2][1])] == [SyncBatchNorm] * 3
    assert model[1] is model[2][0]
    assert model[1].note == "kept"
    assert {id(t) for t in model.state_dict(keep_vars=True).values()} == before

    assert revert(model) is model
    assert (type(model[1]), type(model[2][1])) == (nn.BatchNorm2d, nn.BatchNorm1d)
    assert {id(t) for t in model.state_dict(keep_vars=True).values()} == before


@pytest.mark.parametrize("base", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d])
def test_subclasses_with_a_forward_of_their_own_are_left_alone(base):
    class Own(base):
        pass

    model = convert(nn.Sequential(Own(3)))
    assert type(model[0]) is Own
