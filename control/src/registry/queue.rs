//! One queue for each container (wire specification, A.7.3): what is asked of one name runs strictly one after another,
//! in the order in which it was asked; different names run side by side.
//!
//! A piece of work is a task of its own. So it runs to its end when whoever asked for it has gone away (a client that
//! hangs up in the middle of a `register` leaves no half of one), and one that panics does not take the queue with it.
//! A queue exists as long as there is work in it: names that are gone leave nothing behind.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::future::BoxFuture;
use tokio::sync::{Notify, oneshot};

type Work = BoxFuture<'static, ()>;

/// The queues of all names; clones are the same ones.
#[derive(Clone, Default)]
pub(crate) struct Queues(Arc<Inner>);

#[derive(Default)]
struct Inner {
    /// What waits, by name. A name is here exactly while something of it runs.
    waiting: Mutex<HashMap<String, VecDeque<Work>>>,
    idle: Notify,
}

impl Queues {
    /// Puts work at the end of a name's queue, and takes its place there before this returns. `None` comes out of the
    /// answer when the work panicked.
    pub(crate) fn enqueue<T: Send + 'static>(
        &self,
        name: &str,
        work: impl Future<Output = T> + Send + 'static,
    ) -> impl Future<Output = Option<T>> + Send + 'static {
        let (answer, answered) = oneshot::channel();
        let work: Work = Box::pin(async move {
            // Whoever asked may have gone away.
            let _ = answer.send(work.await);
        });
        let mut waiting = self.0.lock();
        if let Some(queue) = waiting.get_mut(name) {
            queue.push_back(work);
        } else {
            waiting.insert(name.to_owned(), VecDeque::new());
            tokio::spawn(run(Arc::clone(&self.0), name.to_owned(), work));
        }
        drop(waiting);
        async move { answered.await.ok() }
    }

    /// Returns when no queue has any work.
    pub(crate) async fn settled(&self) {
        let idle = self.0.idle.notified();
        tokio::pin!(idle);
        loop {
            // Heard from here on, so that an end between the look and the wait is not missed.
            idle.as_mut().enable();
            if self.0.lock().is_empty() {
                return;
            }
            idle.as_mut().await;
            idle.set(self.0.idle.notified());
        }
    }

    #[cfg(test)]
    pub(crate) fn names(&self) -> usize {
        self.0.lock().len()
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, VecDeque<Work>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is next for a name; nothing ends its queue.
    fn next(&self, name: &str) -> Option<Work> {
        let mut waiting = self.lock();
        let next = waiting.get_mut(name).and_then(VecDeque::pop_front);
        if next.is_none() {
            waiting.remove(name);
            if waiting.is_empty() {
                self.idle.notify_waiters();
            }
        }
        next
    }
}

async fn run(queues: Arc<Inner>, name: String, first: Work) {
    let mut next = Some(first);
    while let Some(work) = next {
        // A panic is reported where it happened and ends that task alone.
        let _ = tokio::spawn(work).await;
        next = queues.next(&name);
    }
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
