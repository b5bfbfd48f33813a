//! Where this process looks for an engine: what the environment said when it started, and which socket answered.
//!
//! Where nobody says anything, the usual sockets are looked at each time, since an engine may be installed or started later.
//! The first that answers is kept for good: while it is away for a moment, the containers of another engine are not its own.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use rustix::fs::Access;

use super::DockerError;
use super::address::{Address, EngineLocation, Environment, Look, select, whereabouts};

/// Where to look; clones look at the same place.
#[derive(Clone, Debug)]
pub(super) struct Seek(Arc<Seeking>);

#[derive(Debug)]
struct Seeking {
    whereabouts: EngineLocation,
    answered: OnceLock<Address>,
}

impl Seek {
    /// Where this environment says; Docker's own configuration is read now and not again.
    pub(super) fn new(environment: &Environment) -> Seek {
        let whereabouts = whereabouts(environment, read);
        Seek(Arc::new(Seeking { whereabouts, answered: OnceLock::new() }))
    }

    /// The address to ask at now.
    pub(super) fn address(&self) -> Result<Address, DockerError> {
        let unreachable = |at: &str, reason: &str| DockerError::Unreachable {
            at: at.to_owned(),
            reason: reason.to_owned(),
        };
        match &self.0.whereabouts {
            EngineLocation::At(address) => Ok(address.clone()),
            EngineLocation::Nowhere(misled) => Err(unreachable(&misled.at, &misled.reason)),
            EngineLocation::Among(usual) => match self.0.answered.get() {
                Some(answered) => Ok(answered.clone()),
                None => select(usual, look).ok_or_else(|| unreachable("the usual places", "there are none")),
            },
        }
    }

    /// An engine has answered there.
    pub(super) fn answered(&self, address: &Address) {
        // Of two that answered at once the first stays.
        let _ = self.0.answered.set(address.clone());
    }
}

fn look(socket: &Path) -> Look {
    match rustix::fs::access(socket, Access::READ_OK | Access::WRITE_OK) {
        Ok(()) => Look::Usable,
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => Look::Absent,
        Err(_) => Look::Forbidden,
    }
}

fn read(path: &Path) -> Result<Option<String>, String> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.to_string()),
    }
}
