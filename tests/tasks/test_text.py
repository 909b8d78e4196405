"""Text as a task: the table and plot of its report, frozen parameters, kinds of parameters, old run directories."""

import pytest

from lineax_seq.tasks import comparison_table, plot_loss


def test_table_is_sorted_and_aligned():
    lines = comparison_table({"ours": 1.9}, {"gzip -9": 2.87, "bzip2 -9": 1.5}).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["bzip2", "ours", "gzip"]
    assert len({len(line) for line in lines}) == 1


def test_plot_needs_metrics_and_is_whole(tmp_path):
    with pytest.raises(ValueError, match="no training metrics"):
        plot_loss(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 1, "eval_bits_per_byte": 3.0}\n')
    assert plot_loss(tmp_path, {"gzip -9": 2.87}).read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]
