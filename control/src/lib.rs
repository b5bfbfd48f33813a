//! landfall: a server that listens inside a container answers on the host's localhost.
//!
//! This crate is the daemon and the command line; the engine (`landfall-engine`) moves the bytes. A module imports only
//! modules below it in this list; a test enforces that.
//!
//! - `cli`: one file for each verb. Only `cli::ui` prints.
//! - `daemon`: `landfall _hostd`: start and stop order, RPC, HTTP, discovery, supervisor, jobs, tailscale.
//! - `launch`: `landfall start`, which makes a container of a folder, and the reader of `devcontainer.json`.
//! - `agent`: the program inside a container. `broker`: the protocol between it and the daemon.
//! - `forwarding`: the planner, the driver of the engine, and the tasks that enter containers.
//! - `registry`: registrations on disk, approvals of folder files, folder settings, secrets.
//! - `docker`: the Docker engine, the liveness of containers, the helper container.
//! - `sys`: paths, private files, processes, sockets, the journal, and the namespaces of `landfall run`.
//! - `model`: values that the other modules share. Pure.
//!
//! The crate contains no unsafe code. It sends signals through pidfds, or to children that have not been waited for, since
//! any other process id may be reused.

#![forbid(unsafe_code)]

pub mod agent;
pub mod broker;
pub mod cli;
pub mod daemon;
pub mod docker;
pub mod error;
pub mod forwarding;
pub mod launch;
pub mod model;
pub mod registry;
pub mod sys;
pub mod version;
