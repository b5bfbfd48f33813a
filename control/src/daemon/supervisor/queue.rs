//! The restart queue: at most one running and one waiting restart for each container. Pure.

use std::collections::HashMap;
use std::sync::Arc;

use crate::model::registration::{ContainerName, Registration};

/// Whether a restart first builds the image, and who requested it. Ordered: when two restarts are merged, the greater value
/// is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Build {
    /// The container is restarted from the image that it has.
    No,
    /// The container requested the build over HTTP. It needs the right, and keeps its user regardless of the new image.
    ByContainer,
    /// The host's user requested the build. The container takes the user of the new image.
    ByUser,
}

/// A promised restart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Restart {
    pub(super) registration: Arc<Registration>,
    pub(super) build: Build,
}

/// The containers whose restart runs, each with its waiting restart.
#[derive(Default)]
pub(super) struct Queue(HashMap<ContainerName, Option<Restart>>);

impl Queue {
    /// Adds a restart and returns it if it is to run now. Otherwise it is merged into the waiting restart, which takes the
    /// newest registration and the greatest build.
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

    /// Records that the running restart of a container ended. Returns the restart that is to run now.
    pub(super) fn done(&mut self, name: &ContainerName) -> Option<Restart> {
        let next = self.0.get_mut(name).and_then(Option::take);
        if next.is_none() {
            self.0.remove(name);
        }
        next
    }

    /// Returns the containers whose restart runs.
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
    fn further_requests_are_merged_into_one_waiting_restart() {
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
    fn the_waiting_restart_takes_the_greatest_build_and_the_newest_folder() {
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
