//! Finds the address of the engine: from the environment at the start of the process, or from the socket that answered.
//!
//! Without a setting, the default sockets are checked each time, since an engine may be installed or started later. The
//! first one that answers is kept for the life of the process: during a short outage, another engine must not take its
//! place.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use rustix::fs::Access;

use super::DockerError;
use super::address::{Address, EngineLocation, Environment, SocketState, locate, select};

/// The search for an engine. Clones share the result.
#[derive(Clone, Debug)]
pub(super) struct EngineSearch(Arc<SearchState>);

#[derive(Debug)]
struct SearchState {
    location: EngineLocation,
    answered: OnceLock<Address>,
}

impl EngineSearch {
    /// Returns a search in this environment. Docker's own configuration is read once, now.
    pub(super) fn new(environment: &Environment) -> EngineSearch {
        let location = locate(environment, read);
        EngineSearch(Arc::new(SearchState { location, answered: OnceLock::new() }))
    }

    /// Returns the address to use now.
    pub(super) fn address(&self) -> Result<Address, DockerError> {
        let unreachable = |at: &str, reason: &str| DockerError::Unreachable {
            at: at.to_owned(),
            reason: reason.to_owned(),
        };
        match &self.0.location {
            EngineLocation::At(address) => Ok(address.clone()),
            EngineLocation::Nowhere(unusable) => Err(unreachable(&unusable.at, &unusable.reason)),
            EngineLocation::Among(usual) => match self.0.answered.get() {
                Some(answered) => Ok(answered.clone()),
                None => select(usual, socket_state)
                    .ok_or_else(|| unreachable("the usual places", "there are none")),
            },
        }
    }

    /// Records that an engine answered at an address.
    pub(super) fn answered(&self, address: &Address) {
        // Only the first address is stored.
        let _ = self.0.answered.set(address.clone());
    }
}

fn socket_state(socket: &Path) -> SocketState {
    match rustix::fs::access(socket, Access::READ_OK | Access::WRITE_OK) {
        Ok(()) => SocketState::Usable,
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => SocketState::Absent,
        Err(_) => SocketState::Forbidden,
    }
}

fn read(path: &Path) -> Result<Option<String>, String> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.to_string()),
    }
}
