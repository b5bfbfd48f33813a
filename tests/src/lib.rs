//! What the suite stands on: network namespaces, an engine that relays into one, streams whose every byte is known, and
//! waits that end with what they last saw.
//!
//! Each case is a process of its own (see [`case`]) in a network namespace of its own, which plays the host: ports,
//! sysctls, descriptors, limits and memory belong to that case alone, so cases run beside each other and none can hide
//! in another's figures. [`Namespace::new`] makes the container's side.
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
pub mod peer;
pub mod process;
mod relay;
pub mod rpc;
pub mod run;
mod stranger;
mod tcp;
pub mod terminal;
mod traffic;
mod wait;
mod way;

pub use daemon::{Daemon, Home, Start};
pub use docker::{DockerMode, FakeDocker, MOMENT};
pub use haproxy::Haproxy;
pub use landfall_pattern::{Checker, Pattern, Rng};
pub use namespace::Namespace;
pub use relay::{Driver, Forward, Relay};
pub use stranger::{Impostor, Manner, STRANGER, as_stranger, strangers_are_possible};
pub use tcp::{
    End, Server, connect, connect_from, finish, read_exactly, read_some, read_these, read_to_end, reset,
    send_all,
};
pub use traffic::{Conversation, Flood, answer, visit};
pub use wait::{PATIENCE, wait_until};
pub use way::{Agent, Behind, Entered, Scripted, agents_listener, enter, enter_by, honest, way};

/// Tells the person who runs the suite something that is no failure: a figure, or why something could not be tried here.
#[macro_export]
macro_rules! note {
    ($($argument:tt)*) => { $crate::case::note(&format!($($argument)*)) };
}

/// Whether the suite runs in its long form (`tests/run --long`).
pub fn is_long() -> bool {
    std::env::var_os("LANDFALL_LONG").is_some_and(|value| value == "1")
}

/// The seed of this run: `LANDFALL_SEED`, or a fixed one.
pub fn seed() -> u64 {
    std::env::var("LANDFALL_SEED")
        .map_or(20_260, |text| text.parse().expect("LANDFALL_SEED must be a number"))
}
