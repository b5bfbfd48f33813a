//! The engine in this process. No other file starts it.

use std::os::fd::OwnedFd;
use std::sync::mpsc::Receiver;

use landfall_engine::RingChoice;
use landfall_engine::command::{Command, EventMessage};
use landfall_engine::engine::{Engine, EngineOptions, Handle, StartError};
use landfall_engine::process::Drive;
use landfall_engine::watch::hint::HintSource;

use crate::cli::args::Ring;
use crate::version;

/// The command side of the engine.
#[derive(Debug)]
pub(super) struct Driver(Handle);

impl Driver {
    /// Sends a command. Its outcome is reported by events.
    pub(super) fn apply(&self, command: Command, descriptors: Vec<OwnedFd>) {
        self.0.apply(command, descriptors);
    }
}

/// Starts an engine, and returns its command side and its event side.
pub(super) fn start(ring: Ring) -> Result<(Driver, Receiver<EventMessage>), StartError> {
    let (handle, events) = engine(ring)?.into_parts();
    Ok((Driver(handle), events))
}

/// Starts an engine in the process of a verb.
pub(super) fn engine(ring: Ring) -> Result<Engine, StartError> {
    let ring = match ring {
        Ring::Auto => RingChoice::Auto,
        Ring::IoUring => RingChoice::IoUring,
        Ring::Epoll => RingChoice::Epoll,
    };
    Engine::start(EngineOptions {
        ring,
        hints: HintSource::Open,
        version: version::current(),
        ..EngineOptions::default()
    })
}

/// Starts an engine in a dedicated process, which may be confined after the start.
pub(super) fn start_process(hints: HintSource) -> Result<Engine, StartError> {
    Engine::start(EngineOptions { hints, version: version::current(), ..EngineOptions::default() })
}
