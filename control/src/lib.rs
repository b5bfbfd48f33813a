//! landfall: what listens in a container answers on the host's localhost.
//!
//! This crate decides and talks; the engine (`landfall-engine`) moves the bytes and never knows a name.
//!
//! - `policy` and `reconcile` are pure: what may be exposed, and which commands close the gap.
//! - `forward` is the shell around them: events of the engine in, commands and lines for people out.
//! - `sandbox` makes a namespace for `landfall run`; `processes` finds out who owns a socket.
//! - `cli` has one file a verb. What a program prints goes through `cli::output`, nowhere else.
//! - `agent` is the program inside a container; `broker` is what it and the daemon say to each other.
//! - `daemon` puts together what runs as `landfall _hostd`: `registration` remembers, `rpc` and `http` are how it is asked,
//!   `supervisor` restarts containers through `docker`, `jobs` run at intervals as a `folder` configures them.
//! - `model` holds values that several parts share, such as the approvals of `landfall trust`; `registry` keeps them on disk.
//! - `devcontainer` reads what a folder or an image says of its ports.
//! - `model` holds pure values: what the host's user granted to containers.
//! - `discovery` registers the containers that Docker has, as their labels or people say.
//! - `start` turns a folder into a container that runs.
//! - `tailscale` offers what answers on the host on the user's tailnet, where that is wanted.
//! - `helper` keeps a container that enters the others, where the daemon's own user may not.
//! - `paths` and `registration::file` name all state on disk: what a container was registered with, and the log.
//!
//! Absent on purpose: unsafe code, and signals by process id (a pidfd cannot hit a stranger).

#![forbid(unsafe_code)]

pub mod agent;
pub mod broker;
pub mod cli;
pub mod daemon;
pub mod devcontainer;
pub mod discovery;
pub mod docker;
pub mod events;
pub mod folder;
pub mod forward;
pub mod helper;
pub mod http;
pub mod jobs;
pub mod linger;
pub mod liveness;
pub mod model;
pub mod name;
pub mod native;
pub mod paths;
pub mod policy;
pub mod processes;
pub mod reconcile;
pub mod registration;
pub mod registry;
pub mod rpc;
mod running;
pub mod sandbox;
pub mod secrets;
pub mod start;
pub mod supervisor;
mod sys;
pub mod tailscale;
pub mod version;
pub mod waiting;
