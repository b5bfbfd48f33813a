//! The whole way, with a real Docker engine: what listens in a container answers on the host, through every event of its life.
//!
//! Each case is a process of its own in a network namespace of its own, which plays the host (see `landfall_tests::case`),
//! and starts an engine of its own there: its containers, ports, bridges and restarts are nobody else's. It takes root and the
//! images that `tests/docker/images.sh` makes, so the cases are run only when they are asked for, by `tests/docker.sh`.
#![expect(clippy::unwrap_used, reason = "tests may stop at the first surprise")]

mod browser;
mod engine;
mod found;
mod latency;
mod life;
mod outage;
mod podman;
mod vite;

fn main() -> std::process::ExitCode {
    landfall_tests::case::main_when_asked(
        &[found::CASES, life::CASES, outage::CASES, vite::CASES, podman::CASES, latency::CASES],
        &[],
    )
}
