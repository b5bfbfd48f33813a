//! The grants in force: those that were read from the files at the start, and the later changes.
//!
//! A change is written to disk, in the queue of its container, before it is visible here. Readers never wait.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use thiserror::Error;

use crate::model::grants::{self, GrantFact, Grants, Right, RightError};
use crate::model::registration::{ContainerName, Registration};
use crate::registry::file::{self, InvalidFile};
use crate::sys::paths::Home;

/// The reasons to refuse a change of grants. The texts are part of the wire specification.
#[derive(Debug, Error)]
pub enum GrantError {
    /// The daemon is stopping.
    #[error("daemon stopping")]
    Stopping,
    /// The name is not registered, so it has no folder for the grant.
    #[error("not registered: {0}")]
    NotRegistered(String),
    /// A right is unknown.
    #[error(transparent)]
    Right(#[from] RightError),
    /// The right comes with the registration, so it cannot be revoked.
    #[error("{0} comes with the registration of {1}, which has no attach method")]
    OfRegistration(Right, ContainerName),
    /// The file of the name is invalid. It is kept unchanged.
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
    /// Returns whether a registered container has a right.
    pub fn has_right(&self, right: Right, registration: &Registration) -> bool {
        grants::has_right(right, registration, self.lock().get(&registration.container_name))
    }

    /// Returns all rights of a registered container, in force or not.
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
/// [`GrantError`]; the file is then unchanged.
pub(crate) fn change(
    home: &Home,
    name: &ContainerName,
    change: impl FnOnce(&mut Grants) -> Result<bool, GrantError>,
) -> Result<Grants, GrantError> {
    let kept =
        file::load_one(home, name).map_err(|invalid| GrantError::InvalidFile(name.clone(), invalid))?;
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
