//! One queue for each container (wire specification, A.7.3): work for one name runs strictly one after another, in order of
//! arrival; work for different names runs concurrently.
//!
//! Each piece of work is a task of its own. It therefore runs to its end when the caller has gone (a client that disconnects
//! during a `register` leaves no partial registration), and a panic does not end the queue. A queue exists only while it has
//! work, so removed names use no memory.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::future::BoxFuture;
use tokio::sync::{Notify, oneshot};

type Work = BoxFuture<'static, ()>;

/// The queues of all names. Clones share them.
#[derive(Clone, Default)]
pub(crate) struct Queues(Arc<Inner>);

#[derive(Default)]
struct Inner {
    /// The waiting work by name. A name is present exactly while work of it runs.
    waiting: Mutex<HashMap<String, VecDeque<Work>>>,
    idle: Notify,
}

impl Queues {
    /// Appends work to the queue of a name before it returns. The returned future yields the result, or `None` if the work
    /// panicked.
    pub(crate) fn enqueue<T: Send + 'static>(
        &self,
        name: &str,
        work: impl Future<Output = T> + Send + 'static,
    ) -> impl Future<Output = Option<T>> + Send + 'static {
        let (answer, answered) = oneshot::channel();
        let work: Work = Box::pin(async move {
            // The send fails if the caller has gone.
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

    /// Returns when all queues are empty.
    pub(crate) async fn wait_until_idle(&self) {
        let idle = self.0.idle.notified();
        tokio::pin!(idle);
        loop {
            // Enable first, so that an end between the check and the wait is not missed.
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

    /// Returns the next work of a name. Without work, removes its queue.
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
        // A panic was reported where it happened, and ends only that task.
        let _ = tokio::spawn(work).await;
        next = queues.next(&name);
    }
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
