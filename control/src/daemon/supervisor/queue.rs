//! One restart at a time for a container, and one that waits. Pure.

use std::collections::HashMap;
use std::sync::Arc;

use crate::model::registration::{ContainerName, Registration};

/// Whether a restart first builds the image, and at whose request. Ordered: of two restarts that become one, the greater
/// counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Build {
    /// The container is restarted from the image that it has.
    No,
    /// The container asked for it over HTTP. It needs the right, and keeps its user whatever the new image has.
    ByContainer,
    /// The host's user asked for it. The container takes the user of the new image.
    ByUser,
}

/// A restart that was promised.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Restart {
    pub(super) registration: Arc<Registration>,
    pub(super) build: Build,
}

/// The containers whose restart runs, each with the one that waits for it.
#[derive(Default)]
pub(super) struct Queue(HashMap<ContainerName, Option<Restart>>);

impl Queue {
    /// Adds a restart. What is returned runs now. One that waits takes the newest registration, and the greatest build of
    /// those that were folded into it.
    pub(super) fn add(&mut self, restart: Restart) -> Option<Restart> {
        let Some(waiting) = self.0.get_mut(&restart.registration.container_name) else {
            self.0.insert(restart.registration.container_name.clone(), None);
            return Some(restart);
        };
        let waiting_build = waiting.as_ref().map_or(Build::No, |waiting| waiting.build);
        let build = restart.build.max(waiting_build);
        *waiting = Some(Restart { build, ..restart });
        None
    }

    /// The one that ran has ended; what is returned runs now.
    pub(super) fn done(&mut self, name: &ContainerName) -> Option<Restart> {
        let next = self.0.get_mut(name).and_then(Option::take);
        if next.is_none() {
            self.0.remove(name);
        }
        next
    }

    /// The containers whose restart runs.
    pub(super) fn running(&self) -> impl Iterator<Item = &ContainerName> {
        self.0.keys()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn restart(name: &str, cwd: &str, build: Build) -> Restart {
        let fields = json!({"containerName": name, "cwd": cwd});
        let registration = Registration::from_fields(fields.as_object().unwrap().clone()).unwrap();
        Restart { registration: Arc::new(registration), build }
    }

    #[test]
    fn one_runs_and_one_waits_whatever_else_is_asked() {
        let mut queue = Queue::default();
        let name = ContainerName::new("coder").unwrap();
        assert!(queue.add(restart("coder", "/a", Build::No)).is_some());
        for _ in 0..3 {
            assert!(queue.add(restart("coder", "/a", Build::No)).is_none());
        }
        assert!(queue.done(&name).is_some());
        assert!(queue.done(&name).is_none());
        assert_eq!(queue.running().count(), 0);
        assert!(queue.add(restart("coder", "/a", Build::No)).is_some());
    }

    #[test]
    fn the_one_that_waits_builds_if_anybody_asked_and_takes_the_newest_folder() {
        let mut queue = Queue::default();
        let name = ContainerName::new("coder").unwrap();
        queue.add(restart("coder", "/a", Build::No));
        queue.add(restart("coder", "/b", Build::ByContainer));
        queue.add(restart("coder", "/c", Build::No));
        assert_eq!(queue.done(&name), Some(restart("coder", "/c", Build::ByContainer)));
        queue.add(restart("coder", "/d", Build::ByUser));
        queue.add(restart("coder", "/e", Build::ByContainer));
        assert_eq!(queue.done(&name), Some(restart("coder", "/e", Build::ByUser)));
    }

    #[test]
    fn containers_do_not_wait_for_each_other() {
        let mut queue = Queue::default();
        assert!(queue.add(restart("one", "/a", Build::No)).is_some());
        assert!(queue.add(restart("two", "/a", Build::No)).is_some());
    }
}
