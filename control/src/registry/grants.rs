//! The grants that are in force: what was read from the files at the start, and each change since.
//!
//! A change is written before it is visible here, inside the queue of its container. Reading never waits.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use thiserror::Error;

use crate::model::grants::{self, GrantFact, Grants, Right, RightError};
use crate::model::registration::{ContainerName, Registration};
use crate::registry::file::{self, InvalidFile};
use crate::sys::paths::Home;

/// The reasons to refuse a change of grants. The texts are the wire's.
#[derive(Debug, Error)]
pub enum GrantError {
    /// The daemon is stopping.
    #[error("daemon stopping")]
    Stopping,
    /// The name has no registration, whose folder the grant would be bound to.
    #[error("not registered: {0}")]
    NotRegistered(String),
    /// A word names no right.
    #[error(transparent)]
    Right(#[from] RightError),
    /// A right comes with the registration, which revoking does not change.
    #[error("{0} comes with the registration of {1}, which has no attach method")]
    OfRegistration(Right, ContainerName),
    /// The file of the name holds something else. It is kept as it is.
    #[error("the grants of {0} cannot be read and are kept as they are: {1}")]
    InvalidFile(ContainerName, InvalidFile),
    /// The file could not be written.
    #[error("failed to persist grants: {0}")]
    Persist(String),
}

/// The grants of all containers. Clones share one table.
#[derive(Clone, Debug, Default)]
pub struct GrantTable(Arc<Mutex<BTreeMap<ContainerName, Grants>>>);

impl GrantTable {
    /// Whether a registered container has a right.
    pub fn has_right(&self, right: Right, registration: &Registration) -> bool {
        grants::has_right(right, registration, self.lock().get(&registration.container_name))
    }

    /// Every right of a registered container, in force or not.
    pub fn facts(&self, registration: &Registration) -> Vec<GrantFact> {
        grants::facts(registration, self.lock().get(&registration.container_name))
    }

    /// Replaces the grants of a name.
    pub(crate) fn put(&self, grants: Grants) {
        self.lock().insert(grants.container_name.clone(), grants);
    }

    /// Removes the grants of a name.
    pub(crate) fn remove(&self, name: &ContainerName) {
        self.lock().remove(name);
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<ContainerName, Grants>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads the grants of a name from its file, changes them, and writes them back. Blocks on the disk.
///
/// # Errors
/// [`GrantError`]; the file is then as it was.
pub(crate) fn change(
    home: &Home,
    name: &ContainerName,
    change: impl FnOnce(&mut Grants) -> Result<bool, GrantError>,
) -> Result<Grants, GrantError> {
    let kept = file::load_one(home, name).map_err(|unfit| GrantError::InvalidFile(name.clone(), unfit))?;
    let mut grants = kept.unwrap_or_else(|| Grants::none(name.clone()));
    if change(&mut grants)? {
        let written = match grants.is_empty() {
            true => file::remove::<Grants>(home, name),
            false => file::write(home, &grants),
        };
        written.map_err(|error| GrantError::Persist(error.to_string()))?;
    }
    Ok(grants)
}
