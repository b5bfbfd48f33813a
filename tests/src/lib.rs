//! The test harness: network namespaces, an engine that relays into one, streams whose every byte is known, and waits with a
//! time limit that report the last state.
//!
//! Each case is a process of its own (see [`case`]) in its own network namespace, which plays the host. Ports, sysctls,
//! descriptors, limits and memory belong to that case alone. So cases run in parallel and do not affect each other's
//! figures. [`Namespace::new`] makes the container's side.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a harness of tests: what surprises it fails the test"
)]

pub mod broker;
pub mod case;
mod daemon;
mod docker;
mod haproxy;
pub mod http;
pub mod latency;
mod namespace;
mod other_user;
pub mod peer;
pub mod process;
mod relay;
pub mod rpc;
pub mod run;
mod tcp;
pub mod terminal;
mod traffic;
mod upstream;
mod wait;

pub use daemon::{Daemon, Home, Start};
pub use docker::{DockerMode, FakeDocker, NEGATIVE_WAIT};
pub use haproxy::Haproxy;
pub use landfall_pattern::{Checker, Pattern, Rng};
pub use namespace::Namespace;
pub use other_user::{Impostor, ImpostorReply, OTHER_UID, as_other_user, can_change_user};
pub use relay::{Driver, Forward, Relay};
pub use tcp::{
    End, Server, connect, connect_from, expect_bytes, finish, read_exactly, read_some, read_to_end, reset,
    send_all,
};
pub use traffic::{Conversation, Flood, answer, visit};
pub use upstream::{
    Agent, Entered, Scripted, UpstreamGuard, agent_listener, enter, honest_answer, set_upstream_kind,
    upstream_kind,
};
pub use wait::{TIMEOUT, wait_until};

/// Prints information that is not a failure: a figure, or the reason why a test was skipped on this machine.
#[macro_export]
macro_rules! note {
    ($($argument:tt)*) => { $crate::case::note(&format!($($argument)*)) };
}

/// Returns whether the suite runs in its long form (`tests/run --long`).
pub fn is_long() -> bool {
    std::env::var_os("LANDFALL_LONG").is_some_and(|value| value == "1")
}

/// Returns the seed of this run: `LANDFALL_SEED`, or a fixed one.
pub fn seed() -> u64 {
    std::env::var("LANDFALL_SEED")
        .map_or(20_260, |text| text.parse().expect("LANDFALL_SEED must be a number"))
}
