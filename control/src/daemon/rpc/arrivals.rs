//! Processes requests that arrive together in the order in which their connections were accepted. A register and the
//! deregister that follows it therefore end unregistered (wire specification, A.7.3), also over two connections.
//!
//! Readiness order alone does not ensure that: during one poll, the line of an earlier connection may arrive just after that
//! connection was polled and before a later connection is polled, whose line then comes first. Therefore a connection with a
//! complete line waits until all ready sockets have been polled once more. Then all waiting connections continue, the
//! earliest first.

use std::collections::BTreeMap;
use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;
use tokio::task::yield_now;

/// The connections that have a complete request and wait, by the number of the connection. Clones share one state.
#[derive(Clone, Debug, Default)]
pub(super) struct Arrivals(Arc<Mutex<BTreeMap<u64, oneshot::Sender<()>>>>);

impl Arrivals {
    /// Waits until the request of this connection is to be processed.
    pub(super) async fn wait_in_order(&self, number: u64) {
        let (release, released) = oneshot::channel();
        let is_first = {
            let mut waiting = self.lock();
            waiting.insert(number, release);
            waiting.len() == 1
        };
        if is_first {
            let arrivals = self.clone();
            tokio::spawn(async move { arrivals.release_all().await });
        }
        // The sender is dropped without a message only when the runtime shuts down.
        let _ = released.await;
    }

    /// Releases all waiting connections after another poll: a task that yields runs again after the runtime has polled the
    /// kernel, and after the tasks that this poll woke.
    async fn release_all(&self) {
        yield_now().await;
        let waiting = mem::take(&mut *self.lock());
        for release in waiting.into_values() {
            // The send fails if the connection has ended.
            let _ = release.send(());
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, oneshot::Sender<()>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio_util::sync::CancellationToken;

    /// Completes requests in this order of connections, and returns the order in which they are processed.
    async fn order_of(lines: &[u64]) -> Vec<u64> {
        let arrivals = Arrivals::default();
        let order = Arc::new(Mutex::new(Vec::new()));
        let waiters: Vec<_> = lines
            .iter()
            .map(|number| {
                let (arrivals, order, number) = (arrivals.clone(), Arc::clone(&order), *number);
                tokio::spawn(async move {
                    arrivals.wait_in_order(number).await;
                    order.lock().unwrap().push(number);
                })
            })
            .collect();
        for waiter in waiters {
            waiter.await.unwrap();
        }
        assert!(arrivals.lock().is_empty());
        Arc::into_inner(order).unwrap().into_inner().unwrap()
    }

    #[tokio::test]
    async fn requests_that_arrive_together_are_processed_in_order_of_connection() {
        assert_eq!(order_of(&[2, 1]).await, [1, 2]);
        assert_eq!(order_of(&[1, 2, 3]).await, [1, 2, 3]);
        assert_eq!(order_of(&[7, 9, 8, 3]).await, [3, 7, 8, 9]);
    }

    #[tokio::test]
    async fn an_earlier_request_that_had_to_wait_is_processed_before_a_later_one() {
        let (arrivals, settled) = (Arrivals::default(), CancellationToken::new());
        let order = Arc::new(Mutex::new(Vec::new()));
        let waiter = |number| {
            let (arrivals, settled, order) = (arrivals.clone(), settled.clone(), Arc::clone(&order));
            async move {
                settled.cancelled().await;
                arrivals.wait_in_order(number).await;
                order.lock().unwrap().push(number);
            }
        };
        let earlier = tokio::spawn(waiter(1));
        // The earlier one waits. The later one finds `settled` cancelled without a wait.
        yield_now().await;
        let later = tokio::spawn(waiter(2));
        settled.cancel();
        earlier.await.unwrap();
        later.await.unwrap();
        assert_eq!(*order.lock().unwrap(), [1, 2]);
    }

    #[tokio::test]
    async fn a_connection_that_ends_does_not_block_others() {
        let arrivals = Arrivals::default();
        let ended = tokio::spawn({
            let arrivals = arrivals.clone();
            async move { arrivals.wait_in_order(1).await }
        });
        ended.abort();
        arrivals.wait_in_order(2).await;
        arrivals.wait_in_order(3).await;
    }
}
