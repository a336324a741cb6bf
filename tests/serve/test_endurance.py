"""Two thousand requests leave nothing behind."""

import concurrent.futures
import json
import random

import httpx2
import psutil
import pytest

from tests.lib.server import chat_folder, serving


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_memory_and_descriptors_stay_flat(tmp_path, capsys):
    """Whole answers, streams, clients that leave, and requests that are refused."""
    with serving(chat_folder(tmp_path), tmp_path / "log") as server:
        process = psutil.Process(server.process.pid)
        url = server.url + "/v1/completions"

        def ask(number: int) -> int:
            draw = random.Random(number)
            body = {
                "model": "weights",
                "prompt": "a" * draw.randint(0, 300),
                "max_tokens": draw.randint(1, 20) if draw.random() < 0.9 else -1,
                "stream": draw.random() < 0.5,
                "logprobs": draw.choice([None, 2]),
            }
            with httpx2.stream("POST", url, content=json.dumps(body), timeout=120) as answer:
                if draw.random() < 0.8:
                    answer.read()
                return answer.status_code

        sizes = []
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            for first in range(0, 2000, 250):
                codes = set(pool.map(ask, range(first, first + 250)))
                assert codes == {200, 400}
                sizes.append((process.memory_info().rss / 1e6, process.num_fds()))
        with capsys.disabled():
            print("\nMB, descriptors:", sizes)
        # The first round fills caches; what leaks grows on.
        assert sizes[-1][0] < sizes[1][0] * 1.05 + 10
        assert sizes[-1][1] <= sizes[0][1] + 8
