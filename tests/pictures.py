"""The dashboards with numbers in them, for docs/images: a cluster under load, a Prometheus, and a browser.

    python tests/pictures.py --minutes 5

Behind Envoy, two prefill and two decode workers get more and more to do; then one of them is killed and comes back,
and for a while more is asked than may wait. `deploy/grafana/pictures` draws what Prometheus has of it with Grafana's
own components. With --data what was scraped is kept; where it is kept already, it is only drawn again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import httpx
import traffic
import yaml
from cluster import Cluster, running
from edge import Edge, running_edge
from pagewire_cli.serve import demo_model
from playwright.async_api import Browser, Route, async_playwright
from processes import Process, free_port

ROOT = Path(__file__).parents[1]
GRAFANA, CONFIG = ROOT / "deploy" / "grafana", ROOT / "deploy" / "compose" / "prometheus.yml"
NODE = GRAFANA / "pictures" / "node_modules"
OUT = ROOT / "docs" / "images"

NUM_CLIENTS, NUM_QUESTIONS, LEAVES, FRESH = 12, 72, 0.03, 0.5
KILLED_AT, BURST_AT, BURST = 0.4, 0.7, 120  # shares of the time, and how many ask at once
FIRST_RATE_S = 20  # until then there is none
WORKER = ("--kv-cache-memory-bytes=12M", "--max-model-len=512", "--max-num-seqs=12", "--threads=1")
ROUTER = ("--max-queued-requests=24",)

WIDTH = 1600
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
BROWSER = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
           "--disable-component-update", "--disable-sync")  # fmt: skip


# ---------------------------------------------------------------- the cluster and its load


async def client(number: int, http: httpx.AsyncClient, share: Mapping[str, float]) -> None:
    """Asks again and again, and is there only while as many are wanted."""
    rng, known = random.Random(number), traffic.questions(NUM_QUESTIONS, 7)
    while True:
        if number > NUM_CLIENTS * share["now"]:
            await asyncio.sleep(0.5)
            continue
        body = rng.choice(known) | ({"cache_salt": str(rng.random())} if rng.random() < FRESH else {})
        await traffic.listen(http, body, rng.randrange(12) if rng.random() < LEAVES else None)
        await asyncio.sleep(rng.random() * 0.5)


async def accident(cluster: Cluster) -> None:
    """A decode worker is lost with what it does, and back after a while."""
    worker = cluster.processes["decode-1"]
    while (await cluster.worker_stats(worker)).num_running < 2:
        await asyncio.sleep(0.05)
    worker.kill()
    await asyncio.sleep(15)
    await cluster.mend()


async def burst(http: httpx.AsyncClient) -> None:
    """More than may wait: some are answered 429."""
    await asyncio.gather(*(traffic.listen(http, body) for body in traffic.questions(BURST, 8)))


async def load(cluster: Cluster, edge: Edge, seconds: float) -> None:
    share, many = {"now": 0.0}, httpx.Limits(max_connections=None)
    base_url = f"http://127.0.0.1:{edge.http}"
    async with httpx.AsyncClient(base_url=base_url, limits=many, timeout=60, trust_env=False) as http:
        clients = [asyncio.create_task(client(i, http, share)) for i in range(NUM_CLIENTS)]
        events = {KILLED_AT: lambda: accident(cluster), BURST_AT: lambda: burst(http)}
        begin, under_way = time.monotonic(), []
        while (t := (time.monotonic() - begin) / seconds) < 1:
            share["now"] = 0.3 + 0.7 * math.sin(math.pi * t) ** 2
            under_way += [asyncio.create_task(events.pop(at)()) for at in list(events) if t > at]
            await asyncio.sleep(0.5)
        await asyncio.gather(*under_way)
        for task in clients:
            task.cancel()
        await asyncio.gather(*clients, return_exceptions=True)


async def observed(data: Path, seconds: float) -> None:
    """Leaves what Prometheus scraped in `data`, and in times.json from when to when."""
    made = Cluster(demo_model(), data, prefill=2, decode=2, worker_flags=WORKER, router_flags=ROUTER)
    async with running(made) as cluster:
        bridge, router = urlsplit(cluster.base_url).netloc, cluster.processes["router"].address
        with running_edge(data / "envoy", (f"--bridges={bridge}", f"--routers={router}")) as edge:
            await cluster.until(edge.ready, "Envoy is not ready")
            targets = {"pagewire": bridge, "pagewire-bridge": bridge, "envoy": f"127.0.0.1:{edge.metrics}"}
            async with prometheus(data, targets):
                begin = time.time() + FIRST_RATE_S
                await load(cluster, edge, seconds)
                (data / "times.json").write_text(json.dumps({"from": begin, "to": time.time()}))


@asynccontextmanager
async def prometheus(data: Path, targets: Mapping[str, str]) -> AsyncIterator[str]:
    """Its URL. It has compose's configuration and our rules, and scrapes the job's address in `targets`, if there."""
    config = yaml.safe_load(CONFIG.read_text())
    config["rule_files"] = [str(ROOT / "deploy" / "prometheus" / "rules.yml")]
    for job in config["scrape_configs"]:
        job.pop("dns_sd_configs", None)
        job["static_configs"] = [{"targets": [targets[job["job_name"]]] if job["job_name"] in targets else []}]
    (data / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    command = ["prometheus", f"--config.file={data}/prometheus.yml", f"--storage.tsdb.path={data}/tsdb",
               f"--web.listen-address={address}", "--log.level=warn"]  # fmt: skip
    process = Process("prometheus", command, address, data / "prometheus.log")
    process.start()
    try:
        async with httpx.AsyncClient(trust_env=False) as http:
            while not await answers(http, f"http://{address}/-/ready"):
                assert process.alive, process.log.read_text()
                await asyncio.sleep(0.1)
        yield f"http://{address}"
    finally:
        process.stop()


async def answers(http: httpx.AsyncClient, url: str) -> bool:
    try:
        return (await http.get(url)).status_code == 200
    except httpx.TransportError:
        return False


# ---------------------------------------------------------------- the pictures


def bundled(directory: Path) -> Path:
    """The page with all that it imports."""
    subprocess.run(
        [NODE / ".bin" / "esbuild", "page.tsx", "--bundle", "--format=esm", "--jsx=automatic", "--log-level=error",
         "--loader:.ttf=empty", "--define:process.env.NODE_ENV='production'", f"--outfile={directory}/page.js"],
        cwd=GRAFANA / "pictures", check=True,
    )  # fmt: skip
    return directory


async def drawn(browser: Browser, name: str, base_url: str, page_at: Path, times: Mapping[str, float]) -> str:
    """Writes one dashboard's picture; the titles of panels without data. The page is at Prometheus' own origin."""
    page = await browser.new_page(viewport={"width": WIDTH, "height": 400})
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith(("data:", base_url)) else complaints.append(r.url))
    await page.route(f"{base_url}/pictures/**", lambda route: serve(route, page_at))
    interval = yaml.safe_load(CONFIG.read_text())["global"]["scrape_interval"]
    query = {"dashboard": name, "from": int(times["from"] * 1000), "to": int(times["to"] * 1000), "interval": interval}
    await page.goto(f"{base_url}/pictures/page.html?{urlencode(query)}")
    dashboard = page.locator("#dashboard[data-empty]")
    await dashboard.wait_for(timeout=60_000)
    await page.wait_for_load_state("networkidle")
    await page.screenshot(path=OUT / f"dashboard-{name}.png", full_page=True)
    empty = await dashboard.get_attribute("data-empty")
    await page.close()
    assert not complaints, complaints
    return empty or ""


async def serve(route: Route, page_at: Path) -> None:
    """What the page asks for: itself, the dashboards as they are committed, and Grafana's icons and letters."""
    path = urlsplit(route.request.url).path.removeprefix("/pictures/")
    fonts = {"Regular": "400", "Medium": "500"}
    if path.startswith("build/img/"):
        file = NODE / "@grafana" / "ui" / "dist" / "public" / path.removeprefix("build/")
    elif path.startswith("fonts/inter/"):
        weight = fonts[Path(path).stem.removeprefix("Inter-")]
        file = NODE / "@fontsource" / "inter" / "files" / f"inter-latin-{weight}-normal.woff2"
    else:
        folders = {".js": page_at, ".css": page_at, ".json": GRAFANA / "dashboards", ".html": GRAFANA / "pictures"}
        file = folders[Path(path).suffix] / path
    await route.fulfill(path=file)


async def pictures(data: Path, seconds: float) -> None:
    page_at = bundled(data / "page")
    if not (data / "times.json").exists():
        await observed(data, seconds)
    times = json.loads((data / "times.json").read_text())
    async with prometheus(data, {}) as base_url, async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=[*BROWSER])
        for file in sorted((GRAFANA / "dashboards").glob("*.json")):
            empty = await drawn(browser, file.stem, base_url, page_at, times)
            print(file.stem, f"no data: {empty}" if empty else "")
        await browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--data", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pictures-") as name:
        data = given.data or Path(name) / "data"
        data.mkdir(parents=True, exist_ok=True)
        asyncio.run(pictures(data, given.minutes * 60))


if __name__ == "__main__":
    main()
