use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;

use super::*;

/// An engine with containers that are `old` or `new`, running or stopped. The call with one number fails.
struct Fake {
    containers: RefCell<BTreeMap<String, (&'static str, bool)>>,
    calls: Cell<usize>,
    fails_at: Option<usize>,
}

impl Fake {
    fn new(runs: bool, fails_at: Option<usize>) -> Fake {
        let containers = BTreeMap::from([("coder".to_owned(), ("old", runs))]);
        Fake { containers: RefCell::new(containers), calls: Cell::new(0), fails_at }
    }

    fn call(&self) -> Result<(), DockerError> {
        self.calls.set(self.calls.get() + 1);
        if self.fails_at == Some(self.calls.get()) {
            Err(DockerError::Refused("no".to_owned()))
        } else {
            Ok(())
        }
    }

    fn state(&self) -> Vec<(String, &'static str, bool)> {
        self.containers.borrow().iter().map(|(name, (which, runs))| (name.clone(), *which, *runs)).collect()
    }
}

fn missing(name: &str) -> DockerError {
    DockerError::Refused(format!("no such container: {name}"))
}

impl ContainerActions for Fake {
    async fn runs(&self, name: &str) -> Result<Option<bool>, DockerError> {
        self.call()?;
        Ok(self.containers.borrow().get(name).map(|(_, runs)| *runs))
    }

    async fn rename(&self, from: &str, to: &str) -> Result<(), DockerError> {
        self.call()?;
        let mut containers = self.containers.borrow_mut();
        assert!(!containers.contains_key(to), "the name is taken");
        let container = containers.remove(from).ok_or_else(|| missing(from))?;
        containers.insert(to.to_owned(), container);
        Ok(())
    }

    async fn stop(&self, name: &str) -> Result<(), DockerError> {
        self.call()?;
        self.containers.borrow_mut().get_mut(name).ok_or_else(|| missing(name))?.1 = false;
        Ok(())
    }

    async fn start(&self, name: &str) -> Result<(), DockerError> {
        self.call()?;
        let mut containers = self.containers.borrow_mut();
        assert!(!containers.iter().any(|(other, (_, runs))| other != name && *runs), "the port is in use");
        containers.get_mut(name).ok_or_else(|| missing(name))?.1 = true;
        Ok(())
    }

    async fn remove(&self, name: &str) -> Result<(), DockerError> {
        self.call()?;
        self.containers.borrow_mut().remove(name).map(|_| ()).ok_or_else(|| missing(name))
    }
}

impl Fake {
    async fn create(&self, name: &str) -> Result<(), DockerError> {
        self.call()?;
        let before = self.containers.borrow_mut().insert(name.to_owned(), ("new", false));
        assert!(before.is_none(), "the name is taken");
        Ok(())
    }
}

fn one(which: &'static str, runs: bool) -> Vec<(String, &'static str, bool)> {
    vec![("coder".to_owned(), which, runs)]
}

#[tokio::test]
async fn the_new_container_takes_the_name_and_the_old_one_is_removed() {
    let fake = Fake::new(true, None);
    replace(&fake, "coder", async |name: &str| fake.create(name).await).await.unwrap();
    assert_eq!(fake.state(), one("new", true));
}

#[tokio::test]
async fn a_failure_leaves_the_old_container_unchanged() {
    for runs in [true, false] {
        // The last call removes the old container, and its failure is harmless.
        for call in 1..=5 {
            let fake = Fake::new(runs, Some(call));
            replace(&fake, "coder", async |name: &str| fake.create(name).await).await.unwrap_err();
            assert_eq!(fake.state(), one("old", runs), "call {call}, running: {runs}");
        }
        let fake = Fake::new(runs, Some(6));
        replace(&fake, "coder", async |name: &str| fake.create(name).await).await.unwrap();
        assert_eq!(fake.state()[0], one("new", true)[0]);
    }
}

#[tokio::test]
async fn an_incomplete_new_container_is_removed() {
    for runs in [true, false] {
        let fake = Fake::new(runs, None);
        let create = async |name: &str| {
            fake.create(name).await?;
            Err(DockerError::Refused("no such network".to_owned()))
        };
        let error = replace(&fake, "coder", create).await.unwrap_err().to_string();
        assert_eq!((error.as_str(), fake.state()), ("no such network", one("old", runs)));
    }
}

#[tokio::test]
async fn an_interrupted_replacement_is_recovered() {
    // The state that was left, and the expected one: without a new container, with one that never came up, with one that
    // did.
    for (left, mended) in [
        (vec![("coder.landfall-old", ("old", true))], "old"),
        (vec![("coder.landfall-old", ("old", false))], "old"),
        (vec![("coder", ("new", false)), ("coder.landfall-old", ("old", true))], "old"),
        (vec![("coder", ("new", false)), ("coder.landfall-old", ("old", false))], "old"),
        (vec![("coder", ("new", true)), ("coder.landfall-old", ("old", false))], "new"),
        (vec![("coder", ("old", true))], "old"),
    ] {
        let fake = Fake::new(true, None);
        *fake.containers.borrow_mut() = left.into_iter().map(|(name, it)| (name.to_owned(), it)).collect();
        recover(&fake, "coder").await.unwrap();
        assert_eq!(fake.state(), one(mended, true));
    }
}

#[tokio::test]
async fn a_failure_to_undo_names_the_old_container() {
    struct Stubborn(Fake);
    impl ContainerActions for Stubborn {
        async fn runs(&self, name: &str) -> Result<Option<bool>, DockerError> {
            self.0.runs(name).await
        }
        async fn rename(&self, from: &str, to: &str) -> Result<(), DockerError> {
            if from == "coder" {
                self.0.rename(from, to).await
            } else {
                Err(DockerError::Refused("stuck".to_owned()))
            }
        }
        async fn stop(&self, name: &str) -> Result<(), DockerError> {
            self.0.stop(name).await
        }
        async fn start(&self, _: &str) -> Result<(), DockerError> {
            Err(DockerError::Refused("the port is in use".to_owned()))
        }
        async fn remove(&self, name: &str) -> Result<(), DockerError> {
            self.0.remove(name).await
        }
    }
    let actions = Stubborn(Fake::new(true, None));
    let error = replace(&actions, "coder", async |name: &str| actions.0.create(name).await)
        .await
        .unwrap_err()
        .to_string();
    assert_eq!(
        error,
        "the port is in use; and the old container could not be put back (see coder.landfall-old): stuck"
    );
}
