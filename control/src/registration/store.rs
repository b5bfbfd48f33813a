//! All registrations.

use std::sync::Arc;

use super::model::Registration;

/// The registrations of one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Registered {
    /// In the order in which they came.
    pub entries: Vec<Arc<Registration>>,
}

impl Registered {
    /// The registration of this name.
    pub fn find(&self, name: &str) -> Option<&Arc<Registration>> {
        self.entries.iter().find(|entry| entry.container_name.as_str() == name)
    }
}
