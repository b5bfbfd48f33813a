//! End-to-end tests with a real Docker engine: listeners in a container answer on the host, through every event of its life.
//!
//! Each case is a process of its own in its own network namespace, which plays the host (see `landfall_tests::case`). It
//! starts its own engine there, so its containers, ports, bridges and restarts are private. The cases need root and the
//! images that `tests/docker/images.sh` makes, so they run only on request, by `tests/docker.sh`.
#![expect(clippy::unwrap_used, reason = "tests may stop at the first surprise")]

mod browser;
mod discovery;
mod engine;
mod latency;
mod lifecycle;
mod outage;
mod podman;
mod vite;

fn main() -> std::process::ExitCode {
    landfall_tests::case::main_ignored(
        &[discovery::CASES, lifecycle::CASES, outage::CASES, vite::CASES, podman::CASES, latency::CASES],
        &[],
    )
}
