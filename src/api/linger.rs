//! A body that nobody wants any more is still taken in.
//!
//! A server that answers before a body has arrived, and closes, makes the kernel reset the connection: the client may lose the
//! very answer that says what was wrong, and a request it sent after it. So what is left of a body is read and thrown away,
//! up to the limit of the largest bodies; the time it may take is limited as ever.

use std::future::Future as _;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Bytes, HttpBody};
use hyper::body::{Frame, Incoming, SizeHint};
use tokio::time::{Sleep, sleep};

use crate::kernel::supervisor::detach;

use super::quiet;

/// A body of which each part has to arrive in time. A timer is made only when there is something to wait for: most bodies come
/// with the head of their request.
struct Arriving {
    body: Incoming,
    within: Duration,
    late: Option<Pin<Box<Sleep>>>,
}

impl HttpBody for Arriving {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let (polled, woken) = quiet::hold(|| Pin::new(&mut self.body).poll_frame(cx));
        if !self.body.is_end_stream() {
            woken.wake();
        }
        if let Poll::Ready(frame) = polled {
            self.late = None;
            return Poll::Ready(frame.map(|frame| frame.map_err(axum::Error::new)));
        }
        let within = self.within;
        let late = self.late.get_or_insert_with(|| Box::pin(sleep(within)));
        late.as_mut().poll(cx).map(|()| Some(Err(axum::Error::new("timed out"))))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A body that is read to its end, by whomever.
pub(super) struct Linger {
    body: Option<Arriving>,
    most: usize,
}

impl Linger {
    /// Of more than `most` bytes the rest is not worth the wait; each part has to arrive `within` this.
    pub fn new(body: Incoming, most: usize, within: Duration) -> Self {
        Self { body: Some(Arriving { body, within, late: None }), most }
    }
}

impl HttpBody for Linger {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let Some(body) = self.body.as_mut() else { return Poll::Ready(None) };
        let polled = Pin::new(body).poll_frame(cx);
        match &polled {
            Poll::Ready(Some(Ok(frame))) => {
                let read = frame.data_ref().map_or(0, Bytes::len);
                self.most = self.most.saturating_sub(read);
            }
            Poll::Ready(_) => self.body = None,
            Poll::Pending => {}
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(HttpBody::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or_else(|| SizeHint::with_exact(0), HttpBody::size_hint)
    }
}

impl Drop for Linger {
    fn drop(&mut self) {
        let most = self.most;
        let body = self.body.take().filter(|body| !body.is_end_stream());
        // At the very end there is nobody left to read it.
        if let (Some(body), true) = (body, tokio::runtime::Handle::try_current().is_ok()) {
            detach(http_body_util::BodyExt::collect(http_body_util::Limited::new(body, most)));
        }
    }
}
