//! Black-box tests of the daemon: its socket, its HTTP endpoint, its start and its stop.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

#[path = "daemon/docker.rs"]
mod docker;
#[path = "daemon/http.rs"]
mod http;
#[path = "daemon/life.rs"]
mod life;
#[path = "daemon/socket.rs"]
mod socket;
#[path = "daemon/support.rs"]
mod support;
